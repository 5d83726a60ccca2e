/**
 * Expert shift: how often a compressed model's routers choose other experts than the original's (EAC-MoE section 3). Sets are compared,
 * not their order; of a pruned model, the routers' choices before pruning.
 */
import { EacMoeError } from '../errors';

/** Shares of the tokens. */
export interface ShiftRates {
  /** None of the original's experts is left. */
  changedAll: number;
  /** At least one is another. */
  changedAny: number;
  /** At least half are. */
  changedHalf: number;
}

export interface LayerShift extends ShiftRates {
  /** Decoder layer. */
  layer: number;
}

/** Mean over (token, layer), and each MoE layer by itself. */
export interface ExpertShift extends ShiftRates {
  layers: LayerShift[];
}

export interface ShiftCounts {
  tokens: number;
  all: number;
  any: number;
  half: number;
}

/** Compares the chosen experts [tokens, topK] of two routers over the same tokens. */
export function countShift(original: Int32Array, other: Int32Array, topK: number): ShiftCounts {
  if (original.length !== other.length || original.length % topK !== 0) {
    throw new EacMoeError('INVALID_ARGUMENT', 'expected as many chosen experts of both models, topK a token');
  }
  const counts: ShiftCounts = { tokens: original.length / topK, all: 0, any: 0, half: 0 };
  for (let at = 0; at < original.length; at += topK) {
    let changed = topK;
    for (let i = at; i < at + topK; i++) {
      for (let j = at; j < at + topK; j++) {
        if (original[i] === other[j]) {
          changed--;
          break;
        }
      }
    }
    if (changed > 0) counts.any++;
    if (2 * changed >= topK) counts.half++;
    if (changed === topK) counts.all++;
  }
  return counts;
}

/** Sums up the layers. */
export class ShiftMeter {
  readonly #layers = new Map<number, ShiftCounts>();

  add(layer: number, { tokens, all, any, half }: ShiftCounts): void {
    const sum = this.#layers.get(layer) ?? { tokens: 0, all: 0, any: 0, half: 0 };
    this.#layers.set(layer, {
      tokens: sum.tokens + tokens,
      all: sum.all + all,
      any: sum.any + any,
      half: sum.half + half,
    });
  }

  result(): ExpertShift {
    const layers = [...this.#layers].sort(([a], [b]) => a - b).map(([layer, c]) => ({ layer, ...rates(c) }));
    const mean = (key: keyof ShiftRates) => layers.reduce((sum, l) => sum + l[key], 0) / layers.length;
    return {
      changedAll: mean('changedAll'),
      changedAny: mean('changedAny'),
      changedHalf: mean('changedHalf'),
      layers,
    };
  }
}

function rates({ tokens, all, any, half }: ShiftCounts): ShiftRates {
  return { changedAll: all / tokens, changedAny: any / tokens, changedHalf: half / tokens };
}
