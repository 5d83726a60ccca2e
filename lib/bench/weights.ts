/** Random expert weights in memory: several layers of them, so that no cache holds what a token needs. */
import { readFileSync } from 'node:fs';
import { freemem } from 'node:os';
import type { QuantMatrix } from '../../types/native';
import { EacMoeError } from '../errors';
import { randomMatrix, type ExpertMatrices, type GroupOptions } from '../kernels';
import type { LayerShape } from './shapes';

export interface LayerWeights {
  /** [layers][experts] */
  layers: ExpertMatrices[][];
  /** Codes, scales and zero points of one expert. */
  expertBytes: number;
  /** Of all layers. */
  bytes: number;
  dispose(): void;
}

const MIN_CYCLE = 2 ** 28;
/** So many layers do for small shapes: more would cost handles, not memory. */
const MAX_LAYERS = 64;

/**
 * How many bytes of weights a memory-bound benchmark goes through before it comes back to the first: four times the last-level cache, and 256 MiB at
 * least; less where memory is short. `sets`: how many such sets exist at a time.
 */
export function defaultCycle(sets: number): number {
  return Math.min(Math.max(MIN_CYCLE, 4 * lastLevelCache()), freemem() / (4 * sets));
}

/** Bytes of the largest cache, where the system says (Linux); else 0. */
function lastLevelCache(): number {
  for (const index of [3, 2]) {
    try {
      const size = readFileSync(`/sys/devices/system/cpu/cpu0/cache/index${index}/size`, 'utf8');
      const [, number, unit] = /^(\d+)([KM])/.exec(size) ?? [];
      if (number) return Number(number) * (unit === 'M' ? 2 ** 20 : 2 ** 10);
    } catch {
      continue;
    }
  }
  return 0;
}

/**
 * Layers of experts until `atLeast` bytes are reached; one at least, 64 at most.
 *
 * @throws EacMoeError OUT_OF_MEMORY when one layer does not fit into free memory
 */
export async function randomLayers(
  shape: LayerShape,
  options: GroupOptions,
  atLeast: number,
  seed: number,
): Promise<LayerWeights> {
  const { hidden, width, experts } = shape;
  requireMemory(shape, options.bits);
  const layers: ExpertMatrices[][] = [];
  const matrices: QuantMatrix[] = [];
  const make = async (rows: number, cols: number) => {
    const matrix = await randomMatrix(rows, cols, options, seed + matrices.length);
    matrices.push(matrix);
    return matrix;
  };
  const dispose = () => matrices.forEach((matrix) => matrix.dispose());
  let [bytes, expertBytes] = [0, 0];
  try {
    do {
      const layer: ExpertMatrices[] = [];
      for (let e = 0; e < experts; e++) {
        const [gate, up, down] = [
          await make(width, hidden),
          await make(width, hidden),
          await make(hidden, width),
        ];
        layer.push({ gate, up, down });
        expertBytes = gate.byteLength + up.byteLength + down.byteLength;
      }
      layers.push(layer);
      bytes += expertBytes * experts;
    } while (bytes < atLeast && layers.length < MAX_LAYERS);
  } catch (error) {
    dispose();
    throw error;
  }
  return { layers, expertBytes, bytes, dispose };
}

/** Codes alone are counted: what is left out is a tenth. */
function requireMemory({ name, hidden, width, experts }: LayerShape, bits: number): void {
  const [bytes, free] = [(3 * hidden * width * experts * bits) / 8, freemem()];
  if (bytes <= free) return;
  const gigabytes = (n: number) => `${(n / 1e9).toFixed(1)} GB`;
  throw new EacMoeError(
    'OUT_OF_MEMORY',
    `the ${experts} experts of shape ${name} take ${gigabytes(bytes)} at ${bits} bit, and ${gigabytes(free)} are free: choose fewer or smaller experts`,
  );
}
