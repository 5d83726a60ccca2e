/** quantizeMoE from a source directory to a model that runs: what is written, what is reported, and that both are what is used. */
import { mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { SUPPORTED_MODEL_TYPES } from '../../lib/architecture';
import { requiredTensors } from '../../lib/architecture/tensors';
import { moduleOf, quantizationOf, readMatrix } from '../../lib/checkpoint/quantized';
import { writeSafetensors } from '../../lib/checkpoint/safetensors';
import { writeJson } from '../../lib/checkpoint/files';
import { Checkpoint } from '../../lib/checkpoint/source';
import { evaluate } from '../../lib/evaluate';
import { MoeModel } from '../../lib/model/model';
import { pruneExperts } from '../../lib/prune/pesf';
import { quantizeMoE } from '../../lib/quantize';
import type { Progress, QuantizeOptions, QuantizeReport } from '../../lib/quantize/options';
import type { QuantMatrix } from '../../types/native';
import { describeWith, readJson, scratch, shared } from '../checkpoint/helpers';
import { shows } from '../families/shows';
import { TINY_CONFIG, writeSynthetic } from '../synthetic';
import { dequantize } from './gptq-layout';
import { FEW, logitsOf, randomIds, relativeError, TRIO } from './helpers';

const dir = scratch();
let runs = 0;

/** Quantizes into a fresh directory. */
async function quantize(
  source: string,
  options: Partial<QuantizeOptions>,
): Promise<{ output: string; model: MoeModel; report: QuantizeReport }> {
  const output = join(dir, `run-${runs++}`);
  return { output, ...(await quantizeMoE(source, { ...FEW, ...options, output })) };
}

const CALIBRATIONS: [string, QuantizeOptions['calibration']][] = [
  ['self', 'self'],
  [
    'texts',
    [
      'The river rose in the spring and fell in the summer. '.repeat(20),
      'def f(x):\n    return x + 1\n'.repeat(20),
    ],
  ],
  ['token ids', randomIds(4096)],
];

describe.each(CALIBRATIONS)('the bundled model, calibrated with %s', (kind, calibration) => {
  const progress: Progress[] = [];
  let run: Awaited<ReturnType<typeof quantize>>;
  beforeAll(async () => {
    run = await quantize(TRIO, { calibration, onProgress: (p) => void progress.push(p) });
  });
  afterAll(() => run.model.dispose());

  test('loads back to the same logits', async () => {
    const ids = randomIds(4096, 1, 48)[0]!;
    const again = await MoeModel.load(run.output);
    const expected = await logitsOf(run.model, ids);
    expect(expected.every(Number.isFinite)).toBe(true);
    expect(await logitsOf(again, ids)).toEqual(expected);
    again.dispose();
  });

  test('reports what it did', () => {
    const { report, output } = run;
    const shards = readdirSync(output).filter((name) => name.endsWith('.safetensors'));
    expect(shards).toHaveLength(5);
    expect(report.bytes).toBe(shards.reduce((sum, name) => sum + statSync(join(output, name)).size, 0));
    const tokens = kind === 'texts' ? report.calibration.tokens : 256;
    expect(report.calibration).toEqual({ sequences: tokens / 64, seqLen: 64, tokens });
    expect(tokens).toBeGreaterThanOrEqual(128);
    expect(report.averageBits).toBeGreaterThan(3);
    expect(report.averageBits).toBeLessThan(3.5);
    expect(report.averageBitsWithOverhead - report.averageBits).toBeCloseTo(19 / 128, 1);
    expect(report.layers.map((l) => l.layer)).toEqual([0, 1, 2, 3]);
    for (const { errors, router, seconds } of report.layers) {
      expect(Object.keys(errors).sort()).toEqual(['attention', 'expert', 'shared']);
      for (const error of Object.values(errors)) expect(error > 0 && error < 1).toBe(true);
      expect(seconds).toBeGreaterThan(0);
      const { shiftBefore, shiftAfter, lossBefore, lossAfter, expertTokens, starvedExperts } = router!;
      for (const { changedAll, changedHalf, changedAny } of [shiftBefore, shiftAfter]) {
        expect(
          0 <= changedAll && changedAll <= changedHalf && changedHalf <= changedAny && changedAny <= 1,
        ).toBe(true);
      }
      expect(lossAfter).toBeLessThanOrEqual(lossBefore);
      expect(expertTokens[0]).toBeLessThanOrEqual(expertTokens[1]);
      expect(expertTokens[1]).toBeLessThanOrEqual(tokens);
      expect(starvedExperts.every((e) => e >= 0 && e < 16)).toBe(true);
    }
  });

  test('tells how far it is', () => {
    const fractions = progress.map((p) => p.fraction);
    expect(fractions).toEqual([...fractions].sort((a, b) => a - b));
    expect(fractions[0]).toBe(0);
    expect(fractions.at(-1)).toBe(1);
    expect(new Set(progress.flatMap((p) => p.layer ?? []))).toEqual(new Set([0, 1, 2, 3]));
    expect(progress.some((p) => p.stage === 'sample')).toBe(kind === 'self');
  });

  test('writes a directory that other programs understand', () => {
    const { output, report } = run;
    expect(readdirSync(output).filter((name) => name.includes('partial') || name.startsWith('.'))).toEqual(
      [],
    );
    for (const name of ['tokenizer.json', 'tokenizer_config.json', 'generation_config.json']) {
      expect(readFileSync(join(output, name)).equals(readFileSync(join(TRIO, name)))).toBe(true);
    }
    const { quantization_config, ...rest } = readJson(join(output, 'config.json'));
    expect(rest).toEqual(readJson(join(TRIO, 'config.json')));
    expect(quantization_config).toMatchObject({
      quant_method: 'gptq',
      checkpoint_format: 'gptq_v2',
      bits: 3,
      group_size: 128,
      desc_act: false,
      sym: false,
    });
    const saved = readJson(join(output, 'eac_moe.json'));
    expect(saved).toMatchObject({
      version: report.version,
      source: { name: 'trio-moe-9m' },
      averageBits: report.averageBits,
      averageBitsWithOverhead: report.averageBitsWithOverhead,
      calibrationTokens: report.calibration,
      options: { method: 'gptq', seed: 0, samples: 4, seqLen: 64 },
    });
    expect(saved.layers).toEqual(
      JSON.parse(JSON.stringify(report.layers.map(({ seconds: _, ...layer }) => layer))),
    );
  });
});

const bytesOf = (values: Float32Array) => new Uint8Array(values.buffer, values.byteOffset, values.byteLength);

/** 2 layers; widths that no group size divides. */
const RAGGED = {
  ...TINY_CONFIG,
  hidden_size: 160,
  moe_intermediate_size: 96,
  shared_expert_intermediate_size: 192,
};

describe('options', () => {
  const source = join(dir, 'ragged');
  const probe = randomIds(RAGGED.vocab_size, 1, 100)[0]!;
  const calibration = randomIds(RAGGED.vocab_size, 8);
  let original: MoeModel;
  let expected: Float32Array;
  beforeAll(async () => {
    await writeSynthetic(source, RAGGED);
    original = await MoeModel.load(source);
    expected = await logitsOf(original, probe);
  });
  afterAll(() => original.dispose());

  /** Quantizes; returns how far the logits are from the original's, and how each matrix is quantized. */
  async function tryOptions(options: Partial<QuantizeOptions>) {
    const { model, report, output } = await quantize(source, { calibration, samples: 8, ...options });
    const logits = await logitsOf(model, probe);
    expect(logits.every(Number.isFinite)).toBe(true);
    const quantization = quantizationOf(model.checkpoint.config)!;
    const of = (name: string) => quantization.of(`model.layers.${name}`);
    model.dispose();
    return { error: relativeError(logits, expected), of, report, output };
  }

  test('more bits, less error', async () => {
    const [two, twoAndAHalf, three, four] = await Promise.all([
      tryOptions({ bits: 2 }),
      tryOptions({ bits: 2.5 }),
      tryOptions({ bits: 3 }),
      tryOptions({ bits: 4 }),
    ]);
    expect(two.error).toBeGreaterThan(twoAndAHalf.error);
    expect(twoAndAHalf.error).toBeGreaterThan(three.error);
    expect(three.error).toBeGreaterThan(four.error);
    expect(four.error).toBeLessThan(0.15);
    expect(twoAndAHalf.of('0.mlp.experts.0.up_proj')!.bits).toBe(3);
    expect(twoAndAHalf.of('1.mlp.experts.7.down_proj')!.bits).toBe(2);
    expect(twoAndAHalf.of('1.self_attn.q_proj')!.bits).toBe(4);
    expect(twoAndAHalf.of('1.mlp.gate')).toBeNull();
    expect(twoAndAHalf.report.averageBits).toBeLessThan(three.report.averageBits);
  });

  test('bits by a function', async () => {
    const { of, error } = await tryOptions({
      bits: ({ role, layer, expert, projection }) =>
        role === 'attention'
          ? 16
          : role === 'shared'
            ? 4
            : layer === 0 && expert === 2
              ? 16
              : projection === 'down'
                ? 3
                : 2,
    });
    expect(of('0.self_attn.q_proj')).toBeNull();
    expect(of('0.mlp.shared_expert.up_proj')!.bits).toBe(4);
    expect(of('0.mlp.experts.2.up_proj')).toBeNull();
    expect(of('1.mlp.experts.2.up_proj')!.bits).toBe(2);
    expect(of('1.mlp.experts.2.down_proj')!.bits).toBe(3);
    expect(error).toBeLessThan(0.6);
  });

  test.each([32, 64, 128])('groups of %d, asymmetric and symmetric', async (groupSize) => {
    for (const symmetric of [false, true]) {
      const { error, of } = await tryOptions({ groupSize, symmetric });
      expect(of('0.mlp.experts.0.up_proj')).toEqual({ bits: 3, groupSize, symmetric });
      expect(error).toBeLessThan(0.4);
    }
  });

  test.each<[string, Partial<QuantizeOptions>]>([
    ['no router calibration', { router: false }],
    ['router calibration by mse', { router: { loss: 'mse' } }],
    ['router calibration by topk-mse, k 3', { router: { loss: 'topk-mse', k: 3, ridge: 0.01 } }],
    ['plain GPTQ', { router: false, actOrder: false, twoStreamTargets: false, routingWeightPower: 0 }],
    ['clip search', { clipSearch: true }],
    ['round to nearest', { method: 'rtn', router: false }],
    ['round to nearest with router calibration', { method: 'rtn' }],
    ['no topping up', { minExpertTokens: 0 }],
    ['attention at 16 bit, shared experts like the others', { attentionBits: 16, sharedBits: 'experts' }],
  ])('%s', async (_, options) => {
    const { error, report, output } = await tryOptions(options);
    expect(error).toBeLessThan(0.5);
    const calibrated = options.router !== false;
    const uses = calibrated || options.method !== 'rtn';
    expect(report.calibration.sequences).toBe(uses ? 8 : 0);
    for (const layer of report.layers) {
      if (!uses) expect(layer.router).toBeUndefined();
      // In front of the first router nothing may be quantized yet.
      else if (layer.layer > 0) expect(layer.router!.lossAfter < layer.router!.lossBefore).toBe(calibrated);
    }
    // Routers stay in the original's dtype; those not calibrated, or no better for it, are the original's bytes.
    const [before, after] = [Checkpoint.open(source), Checkpoint.open(output)];
    for (const { layer, router } of report.layers) {
      const name = `model.layers.${layer}.mlp.gate.weight`;
      const [a, b] = [before.tensor(name), after.tensor(name)];
      expect(b.dtype).toBe('bf16');
      if (!router?.kept) expect(b.toArray()).toEqual(a.toArray());
      else if (layer > 0) expect(b.toArray()).not.toEqual(a.toArray());
    }
  });

  test('batches of unequal size', async () => {
    // 17 sequences of 256 tokens: a batch takes 16 of them.
    const many = randomIds(RAGGED.vocab_size, 17, 256);
    const { error, report } = await tryOptions({ calibration: many, samples: 17, seqLen: 256 });
    expect(report.calibration.tokens).toBe(17 * 256);
    expect(error).toBeLessThan(0.4);
  });

  test.each([2, 3, 4] as const)('the file says what the model uses, %d bit', async (bits) => {
    const { model, output } = await quantize(source, { calibration, samples: 8, bits, groupSize: 64 });
    const checkpoint = Checkpoint.open(output);
    const quantization = quantizationOf(checkpoint.config)!;
    const entries: { name: string; dtype: string; shape: number[]; data: Uint8Array }[] = [];
    for (const { name, shape } of requiredTensors(model.architecture)) {
      const q = checkpoint.has(name) ? null : quantization.of(moduleOf(name));
      let data: Uint8Array;
      if (q) {
        data = bytesOf(dequantize(checkpoint, moduleOf(name), q.bits));
        const matrix = (await readMatrix(checkpoint, name, shape[0]!, shape[1]!)) as QuantMatrix;
        expect(matrix.bits).toBe(q.bits);
        expect(Buffer.from((await matrix.dequantize()).toBytes()).equals(data)).toBe(true);
      } else data = bytesOf(checkpoint.tensor(name).toArray() as Float32Array);
      entries.push({ name, dtype: 'F32', shape, data });
    }
    // A model of these weights in full precision gives the same logits.
    const plain = join(dir, `plain-${bits}`);
    mkdirSync(plain);
    await writeSafetensors(join(plain, 'model.safetensors'), entries);
    await writeJson(join(plain, 'config.json'), RAGGED);
    const dequantized = await MoeModel.load(plain);
    const exact = model.withActivations('float32');
    const expected = await logitsOf(dequantized, probe);
    expect(relativeError(expected, await logitsOf(exact, probe))).toBeLessThan(1e-4);
    // The default rounds activations to int8: not the same, but close.
    const rounded = relativeError(expected, await logitsOf(model, probe));
    expect(rounded).toBeGreaterThan(1e-4);
    expect(rounded).toBeLessThan(0.05);
    for (const m of [dequantized, exact, model]) m.dispose();
  });
});

for (const family of SUPPORTED_MODEL_TYPES) {
  describeWith(`goldens/${family}/config.json`, `${family} at 3 bit ${shows(family, 'quantize')}`, () => {
    test('stays close to the original', async () => {
      const source = join(shared, 'goldens', family);
      const original = await MoeModel.load(source);
      const { vocabSize } = original.architecture;
      const { model, report } = await quantize(source, { calibration: randomIds(vocabSize, 8), samples: 8 });
      const probe = randomIds(vocabSize, 1, 100)[0]!;
      const logits = await logitsOf(model, probe);
      expect(logits.every(Number.isFinite)).toBe(true);
      expect(relativeError(logits, await logitsOf(original, probe))).toBeLessThan(0.5);
      const moe = original.architecture.layers.map((l) => l.feedForward.kind === 'moe');
      expect(report.layers.map((l) => l.router !== undefined)).toEqual(moe);
      for (const [i, { errors }] of report.layers.entries()) expect('expert' in errors).toBe(moe[i]);
      const perplexity = randomIds(vocabSize, 1, 256)[0]!;
      const { kl, expertShift } = await evaluate(model, { perplexity, seqLen: 64, reference: original });
      // Random weights predict next to nothing: what is left to lose is little.
      expect(kl).toBeGreaterThan(0);
      expect(kl).toBeLessThan(0.5);
      expect(expertShift!.layers.length).toBe(moe.filter(Boolean).length);

      // PESF: what it prunes are the experts that the router chose least, and nothing else changes.
      const pruned = pruneExperts(model, { alpha: 0.9 });
      const { routing, logits: after } = await pruned.forward(probe, { routing: true });
      expect(after.every(Number.isFinite)).toBe(true);
      const first = (await model.forward(probe, { routing: true })).routing![0]!;
      const chosen = new Array<number>(first.experts).fill(0);
      for (const e of first.indices) chosen[e]!++;
      const threshold = (0.9 * probe.length * first.topK) / first.experts;
      expect(chosen.some((count) => count < threshold)).toBe(true);
      expect([...routing![0]!.indices]).toEqual(
        [...first.indices].map((e) => (chosen[e]! < threshold ? -1 : e)),
      );
      for (const m of [pruned, model, original]) m.dispose();
    });
  });
}
