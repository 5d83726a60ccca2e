/** Every layer of every family on both devices: the same inputs, the same states, routing and outputs within rounding. */
import { join } from 'node:path';
import { describe as architectureOf, SUPPORTED_MODEL_TYPES } from '../../lib/architecture';
import type { LayerSpec } from '../../lib/architecture/types';
import { Checkpoint } from '../../lib/checkpoint/source';
import { seededRandom } from '../../lib/model/random';
import { CheckpointWeights, layerMatrices } from '../../lib/model/weights';
import { native } from '../../lib/native';
import { LayerRunner } from '../../lib/quantize/runner';
import type { Device } from '../../types/native';
import { describeWith, shared } from '../checkpoint/helpers';
import { describeOnCuda } from './helpers';

const LENGTHS = [20, 1, 16];
const TOKENS = 37;

type Values = Record<string, ArrayLike<number>>;

async function run(
  spec: LayerSpec,
  weights: CheckpointWeights,
  width: number,
  device: Device,
): Promise<Values> {
  const random = seededRandom(1);
  const h = native().zeros('f32', [TOKENS, width], device);
  h.write(Float32Array.from({ length: TOKENS * width }, () => 2 * random() - 1));
  const runner = new LayerRunner(spec, weights, device);
  const { stages } = runner;
  const { registers } = stages;
  const batch = { begin: 0, end: TOKENS, lengths: LENGTHS };
  const all = [stages.attentionNorm, stages.feedForward] as const;
  const frame = await runner.run(batch, [[registers.h, h]], ...all, new Int32Array(1));
  const values: Values = { h: h.toArray(), x: frame.read(registers.x) };
  for (const [name, register] of Object.entries(registers.moe ?? {})) {
    values[name] = frame.read(register as number);
  }
  runner.dispose();
  h.dispose();
  return values;
}

describeOnCuda('layers on both devices', () => {
  for (const family of SUPPORTED_MODEL_TYPES) {
    describeWith(`goldens/${family}/config.json`, family, () => {
      test('agree', async () => {
        const checkpoint = Checkpoint.open(join(shared, 'goldens', family));
        const architecture = architectureOf(checkpoint.config);
        const weights = new CheckpointWeights(checkpoint, null);
        await weights.prepare(architecture.layers.flatMap(layerMatrices));
        for (const spec of architecture.layers) {
          const cpu = await run(spec, weights, architecture.hiddenSize, 'cpu');
          const cuda = await run(spec, weights, architecture.hiddenSize, 'cuda');
          expect(Object.keys(cuda)).toEqual(Object.keys(cpu));
          for (const [name, expected] of Object.entries(cpu)) {
            const values = Array.from(expected);
            const scale = values.reduce((m, v) => Math.max(m, Math.abs(v)), 0);
            const found = cuda[name]!;
            const error = values.reduce((e, v, i) => Math.max(e, Math.abs(v - found[i]!)), 0);
            // Indices and counts are equal, or off by 1 at least.
            expect(error / scale).toBeLessThan(5e-5);
          }
        }
        weights.dispose();
        checkpoint.dispose();
      });
    });
  }
});
