/** Weights of experts that share tensors, FP8 and MXFP4, as the decoder gets them. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ExpertPart, LinearSpec } from '../../lib/architecture/types';
import { writeSafetensors, type TensorEntry } from '../../lib/checkpoint/safetensors';
import { Checkpoint } from '../../lib/checkpoint/source';
import { CheckpointWeights } from '../../lib/model/weights';
import type { Tensor } from '../../types/native';
import { expectError, expectRejection, scratch } from '../checkpoint/helpers';
import { bf16Bytes, decodeMxfp4, encodeMxfp4, fp8Entries, mxfp4Entries, toBf16 } from '../formats';

const root = scratch();
let directories = 0;

/** A directory with these tensors; no family reads it. */
async function write(entries: TensorEntry[], quantization_config?: object): Promise<Checkpoint> {
  const dir = join(root, String(directories++));
  mkdirSync(dir);
  await writeSafetensors(join(dir, 'model.safetensors'), entries);
  writeFileSync(join(dir, 'config.json'), JSON.stringify({ model_type: 'x', quantization_config }));
  return Checkpoint.open(dir);
}

/** Small integers: exact in every float dtype. */
const numbers = (count: number, seed: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => ((i * 7 + seed * 31) % 255) - 127);

const f32 = (name: string, shape: number[], values: Float32Array): TensorEntry => ({
  name,
  dtype: 'F32',
  shape,
  data: new Uint8Array(values.buffer),
});
const bf16 = (name: string, shape: number[], values: Float32Array): TensorEntry => ({
  name,
  dtype: 'BF16',
  shape,
  data: bf16Bytes(values),
});

const [E, H, I] = [3, 64, 96];
type Fuse = Pick<ExpertPart, 'from' | 'step' | 'transposed'>;

function spec(
  tensor: string,
  shape: number[],
  expert: number,
  fuse: Fuse,
  out: number,
  inputs: number,
): LinearSpec {
  const part = { tensor, shape, expert, ...fuse };
  const biasShape = [shape[0]!, fuse.transposed ? shape[2]! : shape[1]!];
  return {
    weight: `experts.${expert}.${tensor}.${fuse.from}.weight`,
    out,
    in: inputs,
    fused: { weight: part, bias: { ...part, tensor: `${tensor}_bias`, shape: biasShape } },
  };
}

/** How published families fuse gate and up, and down. */
const LAYOUTS: Record<
  string,
  { tensor: string; shape: number[]; out: number; inputs: number; parts: Fuse[] }
> = {
  'interleaved columns (gpt-oss)': {
    tensor: 'gate_up_proj',
    shape: [E, H, 2 * I],
    out: I,
    inputs: H,
    parts: [0, 1].map((from) => ({ from, step: 2, transposed: true })),
  },
  'columns (gpt-oss)': {
    tensor: 'down_proj',
    shape: [E, I, H],
    out: H,
    inputs: I,
    parts: [{ from: 0, step: 1, transposed: true }],
  },
  'halves of the rows (Granite)': {
    tensor: 'input_linear',
    shape: [E, 2 * I, H],
    out: I,
    inputs: H,
    parts: [0, I].map((from) => ({ from, step: 1, transposed: false })),
  },
  'interleaved rows': {
    tensor: 'rows',
    shape: [E, 2 * I, H],
    out: I,
    inputs: H,
    parts: [0, 1].map((from) => ({ from, step: 2, transposed: false })),
  },
};

describe.each(Object.entries(LAYOUTS))(
  'experts in one tensor: %s',
  (_, { tensor, shape, out, inputs, parts }) => {
    const values = numbers(
      shape.reduce((a, b) => a * b, 1),
      1,
    );
    const [, a, b] = shape as [number, number, number];
    const width = parts[0]!.transposed ? b : a;
    const biases = numbers(E * width, 2);
    const specs = Array.from({ length: E }, (_, e) =>
      parts.map((p) => spec(tensor, shape, e, p, out, inputs)),
    ).flat();

    /** By the definition in types.ts, element by element. */
    function expected({ fused }: LinearSpec): { weight: number[]; bias: number[] } {
      const { expert, from, step, transposed } = fused!.weight;
      const weight: number[] = [];
      for (let r = 0; r < out; r++)
        for (let c = 0; c < inputs; c++) {
          const channel = from + r * step;
          weight.push(values[expert * a * b + (transposed ? c * b + channel : channel * b + c)]!);
        }
      const bias = Array.from({ length: out }, (_, r) => biases[expert * width + from + r * step]!);
      return { weight, bias };
    }

    test.each([
      ['BF16', bf16],
      ['F32', f32],
    ])('%s: weights and biases of every expert', async (dtype, entry) => {
      const checkpoint = await write([
        entry(tensor, shape, values),
        entry(`${tensor}_bias`, [E, width], biases),
      ]);
      const weights = new CheckpointWeights(checkpoint, null);
      await weights.prepare(specs);
      for (const s of specs) {
        const [weight, bias] = [weights.matrix(s) as Tensor, weights.bias(s)];
        expect([weight.dtype, weight.shape, bias.shape]).toEqual([dtype.toLowerCase(), [out, inputs], [out]]);
        expect([...weight.toArray()]).toEqual(expected(s).weight);
        expect([...bias.toArray()]).toEqual(expected(s).bias);
      }
      checkpoint.dispose();
    });

    test('a view of the file where the rows lie together, else a copy that `release` frees', async () => {
      const checkpoint = await write([f32(tensor, shape, values), f32(`${tensor}_bias`, [E, width], biases)]);
      const weights = new CheckpointWeights(checkpoint, null);
      const [s] = specs as [LinearSpec];
      const { transposed, step } = parts[0]!;
      if (transposed || step > 1) {
        expectError(() => weights.matrix(s), 'INTERNAL', s.weight, 'prepared');
        await weights.prepare([s]);
        expect(weights.matrix(s)).toBe(weights.matrix(s));
        weights.release([s]);
        expectError(() => weights.matrix(s), 'INTERNAL', s.weight);
      } else {
        await weights.prepare([s]);
        (weights.matrix(s) as Tensor).rows(0, 1).write(new Float32Array(inputs).fill(5));
        expect([...(weights.matrix(s) as Tensor).rows(0, 1).toArray()]).toEqual(new Array(inputs).fill(5));
      }
      checkpoint.dispose();
    });

    test('the logical name wins, as a quantized copy of the model has it', async () => {
      const own = numbers(out * inputs, 9);
      const [s] = specs as [LinearSpec];
      const checkpoint = await write([f32(tensor, shape, values), f32(s.weight, [out, inputs], own)]);
      const weights = new CheckpointWeights(checkpoint, null);
      await weights.prepare([{ ...s, fused: { weight: s.fused!.weight } }]);
      expect([...(weights.matrix(s) as Tensor).toArray()]).toEqual([...own]);
      checkpoint.dispose();
    });
  },
);

describe('MXFP4', () => {
  /** [experts, rows, inputs], as the blocks lie. */
  const [rows, inputs] = [2 * I, H];
  const values = Float32Array.from(numbers(E * rows * inputs, 3), (x) => x / 64);
  const mxfp4 = { quant_method: 'mxfp4' };

  test.each([
    ['transposed', true],
    ['not transposed', false],
  ])("one expert's part at a time, the logical tensor %s", async (_, transposed) => {
    const shape = transposed ? [E, inputs, rows] : [E, rows, inputs];
    const checkpoint = await write(mxfp4Entries('gate_up_proj', values, [E, rows, inputs]), mxfp4);
    const weights = new CheckpointWeights(checkpoint, null);
    const { blocks, scales } = encodeMxfp4(values);
    const decoded = decodeMxfp4(blocks, scales);
    for (let expert = 0; expert < E; expert++)
      for (const from of [0, 1]) {
        const s = spec('gate_up_proj', shape, expert, { from, step: 2, transposed }, I, H);
        delete s.fused!.bias;
        await weights.prepare([s]);
        const tensor = weights.matrix(s) as Tensor;
        const channels = Array.from({ length: I }, (_, r) => (expert * rows + from + 2 * r) * inputs);
        const expected = channels.flatMap((at) => [...decoded.subarray(at, at + inputs)]);
        expect([tensor.dtype, tensor.shape]).toEqual(['bf16', [I, H]]);
        expect([...tensor.toArray()]).toEqual(expected);
      }
    checkpoint.dispose();
  });

  test('a NaN scale names tensor, matrix and place; other experts do not care', async () => {
    const entries = mxfp4Entries('gate_up_proj', values, [E, rows, inputs]);
    (entries[1]!.data as Uint8Array)[(rows + 3) * 2 + 1] = 255;
    const weights = new CheckpointWeights(await write(entries, mxfp4), null);
    const parts = [0, 1].map((e) => {
      const s = spec('gate_up_proj', [E, inputs, rows], e, { from: 1, step: 2, transposed: true }, I, H);
      return { ...s, fused: { weight: s.fused!.weight } };
    });
    await weights.prepare([parts[0]!]);
    await expectRejection(
      weights.prepare([parts[1]!]),
      'NON_FINITE',
      "tensor 'gate_up_proj_blocks'",
      `'${parts[1]!.weight}'`,
      'scale at [3, 1]',
    );
  });
});

describe('FP8', () => {
  const linear: LinearSpec = { weight: 'q_proj.weight', out: 130, in: 200 };
  const values = Float32Array.from(numbers(130 * 200, 4), (x) => toBf16(x / 100));
  const config = { quant_method: 'fp8', weight_block_size: [64, 128] };

  test('is decoded by `prepare`, which an abort stops', async () => {
    const other = { ...linear, weight: 'k_proj.weight' };
    const entries = [linear, other].flatMap((l) => fp8Entries(l.weight, values, [130, 200], [64, 128]));
    const checkpoint = await write(entries, config);
    const weights = new CheckpointWeights(checkpoint, null);
    expectError(() => weights.matrix(linear), 'INTERNAL', linear.weight);
    const controller = new AbortController();
    const prepared = weights.prepare([linear, other], controller.signal);
    controller.abort();
    await expectRejection(prepared, 'ABORTED');
    expectError(() => weights.matrix(linear), 'INTERNAL', linear.weight);
    await weights.prepare([linear]);
    const tensor = weights.matrix(linear) as Tensor;
    expect([tensor.dtype, tensor.shape]).toEqual(['bf16', [130, 200]]);
    // Three bits of fraction: within 1/16, and the block's smallest steps.
    tensor
      .toArray()
      .forEach((v, i) => expect(Math.abs(v - values[i]!)).toBeLessThan(Math.abs(values[i]!) / 15 + 1e-4));
    weights.dispose();
    checkpoint.dispose();
  });

  test('a NaN code names tensor and place', async () => {
    const entries = fp8Entries(linear.weight, values, [130, 200], [64, 128]);
    (entries[0]!.data as Uint8Array)[129 * 200 + 5] = 0xff;
    const weights = new CheckpointWeights(await write(entries, config), null);
    await expectRejection(
      weights.prepare([linear]),
      'NON_FINITE',
      "'q_proj.weight'",
      'code at [129, 5] is NaN',
    );
  });
});
