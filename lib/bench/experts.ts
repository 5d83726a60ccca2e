/** The fused sparse-expert layer: the benchmark that everything here is about. */
import type { Tensor } from '../../types/native';
import { tensor, zeros } from '../kernels';
import { seededRandom } from '../model/random';
import type { Case, Group, Setting } from './case';
import { programRun, Recorder } from './recorded';
import { rotatingRouting, uniformRouting } from './routing';
import { expertOperations, type LayerShape } from './shapes';
import { randomLayers, type LayerWeights } from './weights';

/** For each number of tokens, the widths side by side. */
export async function* expertGroups(setting: Setting): AsyncGenerator<Group> {
  const { shape, tokens, bits, groupSize, seed, cycle } = setting;
  const weights: LayerWeights[] = [];
  try {
    for (const b of bits) weights.push(await randomLayers(shape, { bits: b, groupSize }, cycle, seed));
    for (const count of tokens) {
      const layers = weights.map((w, i) => {
        const routing = uniformSteps(shape, count, w.layers.length, seed + i);
        return { bits: bits[i]!, layer: recordExperts(setting, w, count, routing) };
      });
      yield {
        cases: layers.map(({ bits: b, layer }) => ({ ...layer, parameters: { tokens: count, bits: b } })),
        dispose: () => layers.forEach(({ layer }) => layer.dispose()),
      };
    }
  } finally {
    weights.forEach((w) => w.dispose());
  }
}

/**
 * The routing of one call after the other, [tokens, topK] each: uniform, enough calls that every expert of every layer had its
 * turn; call i belongs to layer i mod `layers`.
 */
export function uniformSteps(shape: LayerShape, tokens: number, layers: number, seed: number): Int32Array[] {
  const { experts, topK } = shape;
  const random = seededRandom(seed);
  const rounds = Math.ceil(experts / (tokens * topK));
  const decks = Array.from({ length: layers }, () => rotatingRouting(experts, topK, random));
  return Array.from({ length: layers * rounds }, (_, i) =>
    tokens === 1 ? decks[i % layers]!() : uniformRouting(tokens, experts, topK, random),
  );
}

/** A case whose calls are the layer under one routing after the other; index -1 is a pruned choice. */
export function recordExperts(
  setting: Pick<Setting, 'shape' | 'activations' | 'seed'>,
  model: LayerWeights,
  tokens: number,
  steps: Int32Array[],
): Omit<Case, 'parameters'> & { dispose(): void } {
  const { shape, activations, seed } = setting;
  const { hidden, topK } = shape;
  const r = new Recorder();
  const x = r.bound('x', randomInput(tokens, hidden, seed));
  const out = r.bound('out', zeros([tokens, hidden]));
  const shares = tensor(new Float32Array(tokens * topK).fill(1 / topK), [tokens, topK]);
  const weights = r.bound('weights', shares);
  for (const [i, chosen] of steps.entries()) {
    const layer = model.layers[i % model.layers.length]!;
    const [gate, up, down] = [layer.map((e) => e.gate), layer.map((e) => e.up), layer.map((e) => e.down)];
    const indices = r.bound(`indices ${i}`, tensor(chosen, [tokens, topK], 'i32'));
    r.builder.push({ op: 'experts', x, weights, indices, out, gate, up, down, activation: 'silu' });
  }
  const { frame, program, dispose } = r.start([{ length: tokens }], activations);
  const calls = steps.length;
  const total = (count: (indices: Int32Array) => number) => steps.reduce((sum, s) => sum + count(s), 0);
  return {
    bytes: (model.expertBytes * total(distinctExperts)) / calls,
    operations: expertOperations(shape, total(chosenPairs)) / calls,
    arithmetic: activations,
    run: programRun(frame, program),
    dispose,
  };
}

export function distinctExperts(indices: Int32Array): number {
  return new Set(indices.filter((e) => e >= 0)).size;
}

export function chosenPairs(indices: Int32Array): number {
  return indices.filter((e) => e >= 0).length;
}

/** f32 [rows, cols], uniform with variance 1. */
export function randomInput(rows: number, cols: number, seed: number): Tensor {
  const random = seededRandom(seed);
  const values = Float32Array.from({ length: rows * cols }, () => Math.sqrt(12) * (random() - 0.5));
  return tensor(values, [rows, cols]);
}
