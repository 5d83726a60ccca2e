import { cpSync, mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import {
  describe as describeModel,
  SUPPORTED_MODEL_TYPES,
  type Architecture,
  type GroupedAttentionSpec,
  type MoeSpec,
} from '../../lib/architecture';
import type { LinearSpec } from '../../lib/architecture/types';
import { checkTensors, requiredTensors, type TensorSource } from '../../lib/architecture/tensors';
import { normaliseConfig } from '../../lib/checkpoint/config';
import { Checkpoint } from '../../lib/checkpoint/source';
import { describeWith, expectError, readJson, scratch, shared } from '../checkpoint/helpers';

const fixture = (name: string): Record<string, unknown> =>
  readJson(join(__dirname, '../fixtures', `${name}.json`));
const model = (raw: Record<string, unknown>): Architecture => describeModel(normaliseConfig(raw));

const moe = (architecture: Architecture, layer: number): MoeSpec => {
  const { feedForward } = architecture.layers[layer]!;
  if (feedForward.kind !== 'moe') throw new Error(`layer ${layer} is dense`);
  return feedForward;
};

const grouped = (architecture: Architecture, layer: number): GroupedAttentionSpec => {
  const { attention } = architecture.layers[layer]!;
  if (attention.kind !== 'grouped') throw new Error(`layer ${layer} has latent attention`);
  return attention;
};

describe('the families', () => {
  test('mixtral', () => {
    const a = model(fixture('mixtral-8x7b'));
    expect(a).toMatchObject({
      modelType: 'mixtral',
      vocabSize: 32000,
      hiddenSize: 4096,
      maxPositions: 32768,
    });
    expect(a.layers[0]!.attention).toMatchObject({
      heads: 32,
      kvHeads: 8,
      headDim: 128,
      window: 0,
      q: { out: 4096 },
      k: { out: 1024 },
    });
    expect(a.layers[0]!.attentionNorm).toMatchObject({
      kind: 'rms',
      eps: 1e-5,
      weight: 'model.layers.0.input_layernorm.weight',
    });
    const { router, experts } = moe(a, 31);
    expect(router).toMatchObject({
      scoring: 'softmax',
      topK: 2,
      renormalize: true,
      weight: 'model.layers.31.block_sparse_moe.gate.weight',
    });
    expect(experts[7]!.down).toEqual({
      weight: 'model.layers.31.block_sparse_moe.experts.7.w2.weight',
      out: 4096,
      in: 14336,
    });
    expect(experts[7]!.up.weight).toContain('.w3.');
    const windowed = model({ ...fixture('mixtral-8x7b'), sliding_window: 4096, head_dim: 64 });
    expect(windowed.layers[5]!.attention).toMatchObject({
      window: 4096,
      headDim: 64,
      scale: 1 / 8,
      o: { in: 2048 },
    });
  });

  test('phimoe', () => {
    const a = model(fixture('phi-3.5-moe'));
    expect(a.norm).toMatchObject({
      kind: 'layer',
      bias: 'model.norm.bias',
      weight: 'model.norm.weight',
      eps: 1e-5,
    });
    expect(a.head).toMatchObject({ weight: 'lm_head.weight', bias: 'lm_head.bias' });
    const { q, o, rope } = a.layers[3]!.attention;
    expect([q.bias, o.bias]).toEqual([
      'model.layers.3.self_attn.q_proj.bias',
      'model.layers.3.self_attn.o_proj.bias',
    ]);
    expect(rope).toMatchObject({
      dim: 128,
      scale: 1.243163121016122,
      long: { scale: 1.243163121016122, from: 4096 },
    });
    expect(rope.frequencies.length).toBe(64);
    expect(moe(a, 0).router).toMatchObject({
      scoring: 'sparse-mixer',
      topK: 2,
      renormalize: false,
      jitter: 0.01,
    });
    expectError(
      () => model({ ...fixture('phi-3.5-moe'), num_experts_per_tok: 4 }),
      'UNSUPPORTED_MODEL',
      'num_experts_per_tok is 4',
    );
  });

  test('deepseek', () => {
    const a = model(fixture('deepseek-moe-16b'));
    expect(a.layers[0]!.feedForward).toMatchObject({
      kind: 'dense',
      gate: { out: 10944, weight: 'model.layers.0.mlp.gate_proj.weight' },
    });
    const { router, experts, shared: sharedExpert } = moe(a, 1);
    expect(router).toMatchObject({ topK: 6, renormalize: false, out: 64 });
    expect(experts.length).toBe(64);
    expect(sharedExpert).toMatchObject({
      gate: { out: 2816, weight: 'model.layers.1.mlp.shared_experts.gate_proj.weight' },
    });
    expect(sharedExpert!.outputGate).toBeUndefined();
    const other = model({
      ...fixture('deepseek-moe-16b'),
      n_shared_experts: null,
      norm_topk_prob: true,
      moe_layer_freq: 2,
    });
    expect(other.layers.map((l) => l.feedForward.kind).slice(0, 4)).toEqual([
      'dense',
      'dense',
      'moe',
      'dense',
    ]);
    expect(moe(other, 2)).toMatchObject({ router: { renormalize: true } });
    expect(moe(other, 2).shared).toBeUndefined();
    expectError(
      () => model({ ...fixture('deepseek-moe-16b'), scoring_func: 'sigmoid' }),
      'UNSUPPORTED_MODEL',
      'sigmoid',
    );
  });

  test('qwen2_moe', () => {
    const raw = fixture('qwen1.5-moe-a2.7b');
    const a = model(raw);
    const { q, o, window } = grouped(a, 0);
    expect([q.bias, o.bias, window]).toEqual(['model.layers.0.self_attn.q_proj.bias', undefined, 0]);
    expect(moe(a, 0).shared!.outputGate).toEqual({
      weight: 'model.layers.0.mlp.shared_expert_gate.weight',
      out: 1,
      in: 2048,
    });
    const mixed = model({
      ...raw,
      decoder_sparse_step: 2,
      mlp_only_layers: [3],
      tie_word_embeddings: true,
      qkv_bias: false,
    });
    expect(mixed.layers.map((l) => l.feedForward.kind).slice(0, 6)).toEqual([
      'dense',
      'moe',
      'dense',
      'dense',
      'dense',
      'moe',
    ]);
    expect(mixed.head.weight).toBe('model.embed_tokens.weight');
    expect(grouped(mixed, 0).q.bias).toBeUndefined();
    const sliding = model({ ...raw, use_sliding_window: true, sliding_window: 64, max_window_layers: 3 });
    expect([0, 1, 2, 3, 4].map((i) => grouped(sliding, i).window)).toEqual([64, 0, 64, 0, 0]);
    const layer_types = Array.from({ length: 24 }, (_, i) =>
      i === 1 ? 'sliding_attention' : 'full_attention',
    );
    const listed = model({ ...raw, use_sliding_window: true, sliding_window: 64, layer_types });
    expect([0, 1, 2].map((i) => grouped(listed, i).window)).toEqual([0, 64, 0]);
  });

  test('what is no such model, or contradicts itself', () => {
    const raw = fixture('mixtral-8x7b');
    for (const model_type of ['llama', 'mistral', 'qwen2', 'anything']) {
      expectError(
        () => model({ model_type, hidden_size: 8 }),
        'UNSUPPORTED_MODEL',
        `'${model_type}' is a dense model`,
        'mixtral, phimoe',
      );
    }
    expectError(
      () => model({ model_type: 'dbrx2', num_experts: 8 }),
      'UNSUPPORTED_MODEL',
      "'dbrx2' is not supported",
      ...SUPPORTED_MODEL_TYPES,
    );
    expectError(
      () => model({ ...fixture('qwen1.5-moe-a2.7b'), num_experts: 0 }),
      'UNSUPPORTED_MODEL',
      'dense model',
      'none of its layers',
    );
    expectError(
      () => model({ ...raw, num_local_experts: '8' }),
      'INVALID_CHECKPOINT',
      'num_local_experts must be a positive integer, found "8"',
    );
    expectError(() => model({ ...raw, num_local_experts: undefined }), 'INVALID_CHECKPOINT', 'found nothing');
    expectError(
      () => model({ ...raw, num_experts_per_tok: 9 }),
      'INVALID_CHECKPOINT',
      'num_experts_per_tok',
      '8, found 9',
    );
    expectError(
      () => model({ ...raw, num_key_value_heads: 5 }),
      'INVALID_CHECKPOINT',
      'num_key_value_heads',
      'divisor',
    );
    expectError(
      () => model({ ...raw, num_attention_heads: 33, num_key_value_heads: 33 }),
      'INVALID_CHECKPOINT',
      'num_attention_heads',
    );
    expectError(() => model({ ...raw, hidden_act: 'mish' }), 'UNSUPPORTED_MODEL', "'mish'", 'silu');
    expectError(
      () => model({ ...raw, rope_scaling: { rope_type: 'dynamic' } }),
      'UNSUPPORTED_MODEL',
      "'dynamic'",
      'longrope',
    );
  });
});

/** Rounded as the reference prints them (transformers 5.17, modeling_rope_utils). */
describe('rotary frequencies as in transformers', () => {
  const rope = (rope_parameters: object): Architecture['layers'][number]['attention']['rope'] =>
    model({
      ...fixture('mixtral-8x7b'),
      hidden_size: 64,
      num_attention_heads: 4,
      num_key_value_heads: 4,
      num_hidden_layers: 1,
      max_position_embeddings: 4096,
      rope_parameters,
    }).layers[0]!.attention.rope;
  const close = (found: number[], expected: number[]): void => {
    expect(found.length).toBe(expected.length);
    found.forEach((f, i) => expect(Math.abs(f / expected[i]! - 1)).toBeLessThan(1.2e-7));
  };
  const tail = [0.0007905694656074047, 0.0002500000118743628, 7.905694656074047e-5];

  test('default and linear', () => {
    close(
      rope({ rope_type: 'default', rope_theta: 10000 }).frequencies,
      [
        1, 0.3162277638912201, 0.10000000149011612, 0.03162277862429619, 0.009999999776482582,
        0.0031622778624296188, 0.0010000000474974513, 0.0003162277862429619,
      ],
    );
    close(rope({ rope_type: 'linear', rope_theta: 10000, factor: 4 }).frequencies, [
      0.25,
      0.07905694097280502,
      0.02500000037252903,
      0.007905694656074047,
      0.0024999999441206455,
      ...tail,
    ]);
  });

  test('yarn', () => {
    const base = { rope_type: 'yarn', rope_theta: 10000, factor: 4, original_max_position_embeddings: 1024 };
    const plain = rope(base);
    close(plain.frequencies, [
      1,
      0.3162277638912201,
      0.08125000447034836,
      0.019764237105846405,
      0.0043750000186264515,
      ...tail,
    ]);
    expect(plain.scale).toBeCloseTo(1.138629436111989, 12);
    const weighted = rope({ ...base, mscale: 0.7, mscale_all_dim: 0.5, truncate: false });
    close(weighted.frequencies, [
      1,
      0.3162277638912201,
      0.08539863675832748,
      0.019126776605844498,
      0.003556971438229084,
      ...tail,
    ]);
    expect(weighted.scale).toBeCloseTo(1.0259286501478284, 12);
  });

  test('longrope', () => {
    const base = { rope_type: 'longrope', rope_theta: 10000, original_max_position_embeddings: 1024 };
    const eight = (first: number, step: number): number[] =>
      Array.from({ length: 8 }, (_, i) => first + step * i);
    const spec = rope({ ...base, short_factor: eight(1, 0.1), long_factor: eight(2, 1) });
    close(
      spec.frequencies,
      [
        1, 0.2874797582626343, 0.0833333358168602, 0.024325214326381683, 0.0071428571827709675,
        0.0021081853192299604, 0.0006249999860301614, 0.0001860163320088759,
      ],
    );
    close(
      spec.long!.frequencies,
      [
        0.5, 0.10540924966335297, 0.02500000037252903, 0.006324555724859238, 0.0016666667070239782,
        0.00045175396371632814, 0.0001250000059371814, 3.513641786412336e-5,
      ],
    );
    expect(spec.scale).toBeCloseTo(1.0954451150103321, 12);
    expect(spec.long).toMatchObject({ scale: spec.scale, from: 1024 });
    const scaled = rope({
      ...base,
      short_factor: eight(1, 0),
      long_factor: eight(1, 0),
      short_mscale: 1.5,
      long_mscale: 1.7,
    });
    expect([scaled.scale, scaled.long!.scale]).toEqual([1.5, 1.7]);
    expectError(
      () => rope({ ...base, short_factor: [1], long_factor: [1] }),
      'INVALID_CHECKPOINT',
      'short_factor',
      '8 positive',
    );
    expectError(() => rope({ ...base, partial_rotary_factor: 2 }), 'INVALID_CHECKPOINT', '32 of 16');
  });
});

describe('the tensors of a checkpoint', () => {
  const small = {
    ...fixture('qwen1.5-moe-a2.7b'),
    hidden_size: 32,
    num_attention_heads: 2,
    num_key_value_heads: 1,
    num_hidden_layers: 2,
    mlp_only_layers: [0],
    num_experts: 4,
    moe_intermediate_size: 32,
    shared_expert_intermediate_size: 64,
    intermediate_size: 64,
    vocab_size: 10,
  };

  /** A checkpoint that exists on paper only. */
  function paper(
    raw: Record<string, unknown>,
    change: (tensors: Map<string, { dtype: string; shape: number[] }>) => void = () => {},
  ): TensorSource {
    const tensors = new Map(
      requiredTensors(model(raw)).map(({ name, shape }) => [name, { dtype: 'BF16', shape }]),
    );
    change(tensors);
    return {
      dir: 'the-model',
      config: normaliseConfig(raw),
      has: (name) => tensors.has(name),
      info: (name) => tensors.get(name)!,
      names: () => [...tensors.keys()],
    };
  }

  test('roles', () => {
    const tensors = requiredTensors(model(small));
    const find = (name: string) => tensors.find((t) => t.name === name);
    expect(find('model.layers.1.mlp.experts.2.up_proj.weight')).toEqual({
      name: 'model.layers.1.mlp.experts.2.up_proj.weight',
      shape: [32, 32],
      role: 'expert',
      layer: 1,
      expert: 2,
      projection: 'up',
    });
    expect(find('model.layers.0.self_attn.k_proj.bias')).toMatchObject({
      role: 'bias',
      shape: [16],
      layer: 0,
    });
    expect(find('model.layers.1.mlp.shared_expert_gate.weight')).toMatchObject({
      role: 'gate',
      shape: [1, 32],
    });
    expect(find('model.layers.0.mlp.down_proj.weight')).toMatchObject({ role: 'dense', shape: [32, 64] });
    expect(new Set(tensors.map((t) => t.role))).toEqual(
      new Set([
        'embedding',
        'norm',
        'attention',
        'bias',
        'dense',
        'router',
        'expert',
        'shared',
        'gate',
        'head',
      ]),
    );
    expect(new Set(tensors.map((t) => t.name)).size).toBe(tensors.length);
    expect(
      requiredTensors(model({ ...small, tie_word_embeddings: true })).some((t) => t.role === 'head'),
    ).toBe(false);
  });

  /** The same model with its experts in two tensors a layer, as Granite has them; gate and up lie one after the other. */
  function fuseExperts(architecture: Architecture): Architecture {
    const layers = architecture.layers.map((layer, l) => {
      const f = layer.feedForward;
      if (f.kind === 'dense') return layer;
      const fuse = (spec: LinearSpec, expert: number, tensor: string, parts: number, part: number) => {
        const shape = [f.experts.length, parts * spec.out, spec.in];
        const from = part * spec.out;
        const weight = {
          tensor: `model.layers.${l}.${tensor}`,
          shape,
          expert,
          from,
          step: 1,
          transposed: false,
        };
        const bias = { ...weight, tensor: `${weight.tensor}_bias`, shape: shape.slice(0, 2) };
        return { ...spec, fused: { weight, bias } };
      };
      const experts = f.experts.map(({ gate, up, down }, e) => ({
        gate: fuse(gate, e, 'input_linear', 2, 0),
        up: fuse(up, e, 'input_linear', 2, 1),
        down: fuse(down, e, 'output_linear', 1, 0),
      }));
      return { ...layer, feedForward: { ...f, experts } };
    });
    return { ...architecture, layers };
  }

  /** What a checkpoint of fused experts holds. */
  function fusedPaper(change: Parameters<typeof paper>[1] = () => {}): [Architecture, TensorSource] {
    const architecture = fuseExperts(model(small));
    const source = paper(small, (tensors) => {
      for (const { name, fused } of requiredTensors(architecture)) {
        if (!fused) continue;
        tensors.delete(name);
        tensors.set(fused.tensor, { dtype: 'BF16', shape: fused.shape });
      }
      change(tensors);
    });
    return [architecture, source];
  }
  const [IN, OUT] = ['model.layers.1.input_linear', 'model.layers.1.output_linear'];

  test('experts in one tensor: one entry a matrix and bias, counted once', () => {
    const plain = requiredTensors(model(small));
    const [architecture] = fusedPaper();
    const fused = requiredTensors(architecture);
    expect(fused.filter((t) => t.role !== 'bias').map((t) => [t.name, t.shape])).toEqual(
      plain.filter((t) => t.role !== 'bias').map((t) => [t.name, t.shape]),
    );
    expect(fused.find((t) => t.name === 'model.layers.1.mlp.experts.2.up_proj.bias')).toEqual({
      name: 'model.layers.1.mlp.experts.2.up_proj.bias',
      shape: [32],
      role: 'bias',
      layer: 1,
      expert: 2,
      fused: { tensor: `${IN}_bias`, shape: [4, 64], expert: 2, from: 32, step: 1, transposed: false },
    });
  });

  test('experts in one tensor, as floats or MXFP4: what is missing or wrong, by name', () => {
    const check = (change: Parameters<typeof paper>[1]): void => checkTensors(...fusedPaper(change));
    const fails = (change: Parameters<typeof paper>[1], ...texts: string[]) =>
      expectError(() => check(change), 'INVALID_TENSOR', 'the-model', ...texts);
    check(undefined);
    const logical = 'model.layers.1.mlp.experts.0.gate_proj.weight';
    const missing = `'${logical}' (layer 1, expert 0) is missing, and so is '${IN}'`;
    fails((t) => t.delete(IN), missing);
    fails((t) => t.delete(`${OUT}_bias`), 'down_proj.bias', `'${OUT}_bias'`);
    fails((t) => t.set(IN, { dtype: 'U8', shape: [4, 64, 32] }), `'${IN}'`, 'dtype U8');
    fails((t) => t.set(IN, { dtype: 'BF16', shape: [4, 32, 64] }), `'${IN}'`, 'expected [4, 64, 32]');
    fails((t) => t.set('model.layers.1.other', { dtype: 'BF16', shape: [4] }), 'model.layers.1.other');

    const mxfp4 = (change: Parameters<typeof paper>[1]) => (t: Parameters<NonNullable<typeof change>>[0]) => {
      for (const [name, rows] of [
        [IN, 64],
        [OUT, 32],
      ] as const) {
        t.delete(name);
        t.set(`${name}_blocks`, { dtype: 'U8', shape: [4, rows, 1, 16] });
        t.set(`${name}_scales`, { dtype: 'U8', shape: [4, rows, 1] });
      }
      change?.(t);
    };
    check(mxfp4(undefined));
    fails(
      mxfp4((t) => t.delete(`${IN}_blocks`)),
      missing,
    );
    fails(
      mxfp4((t) => t.delete(`${OUT}_scales`)),
      `'${OUT}_scales' (layer 1, expert 0) is missing`,
    );
    fails(
      mxfp4((t) => t.set(`${OUT}_scales`, { dtype: 'U8', shape: [4, 32, 2] })),
      'expected [4, 32, 1]',
    );
    fails(
      mxfp4((t) => t.set(`${OUT}_blocks`, { dtype: 'F32', shape: [4, 32, 1, 16] })),
      'dtype F32',
      'U8',
    );
    // Both forms at once: one of them is stale.
    fails(
      mxfp4((t) => t.set(IN, { dtype: 'BF16', shape: [4, 64, 32] })),
      `'${IN}_blocks'`,
      '1 more',
    );
  });

  test('FP8: matrices only, with their scales', () => {
    const raw = { ...small, quantization_config: { quant_method: 'fp8', weight_block_size: [16, 32] } };
    const name = 'model.layers.1.mlp.experts.3.down_proj.weight';
    const fp8 = (change: Parameters<typeof paper>[1] = () => {}) =>
      checkTensors(
        model(raw),
        paper(raw, (tensors) => {
          for (const t of requiredTensors(model(raw))) {
            if (!t.projection) continue;
            const [out, inputs] = t.shape as [number, number];
            tensors.set(t.name, { dtype: 'F8_E4M3', shape: t.shape });
            const shape = [Math.ceil(out / 16), Math.ceil(inputs / 32)];
            tensors.set(`${t.name}_scale_inv`, { dtype: 'F32', shape });
          }
          change(tensors);
        }),
      );
    fp8();
    const fails = (change: Parameters<typeof paper>[1], ...texts: string[]) =>
      expectError(() => fp8(change), 'INVALID_TENSOR', 'the-model', ...texts);
    fails((t) => t.delete(name), `'${name}' (layer 1, expert 3) is missing`);
    fails((t) => t.delete(`${name}_scale_inv`), `'${name}_scale_inv' (layer 1, expert 3) is missing`);
    fails((t) => t.set(`${name}_scale_inv`, { dtype: 'F32', shape: [1, 1] }), 'expected [2, 1]');
    // Not converted: a matrix of floats has no scales.
    fails(
      (t) => t.set(name, { dtype: 'BF16', shape: [32, 32] }),
      `'${name}_scale_inv'`,
      'belongs to no part',
    );
    for (const other of ['model.layers.1.mlp.gate.weight', 'lm_head.weight', 'model.norm.weight'])
      fails((t) => t.set(other, { ...t.get(other)!, dtype: 'F8_E4M3' }), other, 'F8_E4M3', 'BF16');
  });

  test('layers for multi-token prediction are known extras, as many as config.json says', () => {
    const check = (name: string, extra: Record<string, unknown>) => {
      const raw = { ...small, ...extra };
      checkTensors(
        model(raw),
        paper(raw, (t) => t.set(name, { dtype: 'BF16', shape: [1] })),
      );
    };
    const two = 'model.layers.2.mlp.experts.0.up_proj.weight';
    check(two, { num_nextn_predict_layers: 1 });
    check('model.layers.4.eh_proj.weight', { num_mtp_modules: 3 });
    check('mtp.layers.0.norm.weight', {});
    for (const [name, extra] of [
      [two, {}],
      ['model.layers.3.eh_proj.weight', { num_nextn_predict_layers: 1 }],
      ['model.layers.1.mlp.experts.4.up_proj.weight', { num_nextn_predict_layers: 1 }],
    ] as const)
      expectError(() => check(name, extra), 'INVALID_TENSOR', name, 'belongs to no part');
  });

  test('missing, misshapen, of the wrong dtype, left over: by name', () => {
    const name = 'model.layers.1.mlp.experts.3.down_proj.weight';
    const check = (change: Parameters<typeof paper>[1], raw = small): void =>
      checkTensors(model(raw), paper(raw, change));
    check(undefined);
    check((t) => t.set('model.layers.0.self_attn.rotary_emb.inv_freq', { dtype: 'F32', shape: [8] }));
    expectError(
      () => check((t) => t.delete(name)),
      'INVALID_TENSOR',
      'the-model',
      `'${name}' (layer 1, expert 3) is missing`,
    );
    expectError(
      () => check((t) => t.set(name, { dtype: 'BF16', shape: [32, 31] })),
      'INVALID_TENSOR',
      name,
      '[32, 31]',
      'expected [32, 32]',
    );
    expectError(
      () => check((t) => t.set(name, { dtype: 'BF16', shape: [1024] })),
      'INVALID_TENSOR',
      name,
      '[1024]',
    );
    expectError(
      () => check((t) => t.set(name, { dtype: 'I64', shape: [32, 32] })),
      'INVALID_TENSOR',
      name,
      'dtype I64',
      'BF16',
    );
    expectError(
      () => check((t) => t.set(name, { dtype: 'F8_E4M3', shape: [32, 32] })),
      'INVALID_TENSOR',
      name,
      'F8_E4M3',
    );
    expectError(
      () => check((t) => t.set('model.layers.0.mlp.gate.weight', { dtype: 'F32', shape: [1] })),
      'INVALID_TENSOR',
      'model.layers.0.mlp.gate.weight',
      'no part',
    );
    const head = (t: Map<string, { dtype: string; shape: number[] }>): unknown =>
      t.set('lm_head.weight', { dtype: 'BF16', shape: [10, 32] });
    check(head, { ...small, tie_word_embeddings: true } as typeof small);
  });

  test('quantized modules', () => {
    const module = 'model.layers.1.mlp.experts.3.down_proj';
    const quantization_config = {
      quant_method: 'gptq',
      checkpoint_format: 'gptq_v2',
      bits: 3,
      group_size: 32,
      sym: false,
    };
    const raw = { ...small, quantization_config } as typeof small;
    const pack = (t: Map<string, { dtype: string; shape: number[] }>): void => {
      t.delete(`${module}.weight`);
      t.set(`${module}.qweight`, { dtype: 'I32', shape: [3, 32] });
      t.set(`${module}.qzeros`, { dtype: 'I32', shape: [1, 3] });
      t.set(`${module}.scales`, { dtype: 'F16', shape: [1, 32] });
      t.set(`${module}.g_idx`, { dtype: 'I32', shape: [32] });
    };
    const check = (change: typeof pack, config = raw): void =>
      checkTensors(
        model(config),
        paper(config, (t) => (pack(t), change(t))),
      );
    check(() => {});
    check((t) => t.delete(`${module}.g_idx`));
    expectError(
      () => check((t) => t.delete(`${module}.scales`)),
      'INVALID_TENSOR',
      `${module}.scales`,
      'missing',
    );
    expectError(
      () => check((t) => t.set(`${module}.qweight`, { dtype: 'I32', shape: [2, 32] })),
      'INVALID_TENSOR',
      'qweight',
      '[2, 32]',
      '[3, 32]',
    );
    expectError(
      () => check((t) => t.set(`${module}.weight`, { dtype: 'BF16', shape: [32, 32] })),
      'INVALID_TENSOR',
      'both',
    );
    expectError(() => check(() => {}, small), 'INVALID_TENSOR', `${module}.qweight`, 'quantization_config');
  });
});

describeWith('goldens', 'the reference checkpoints', () => {
  const root = scratch();
  for (const family of SUPPORTED_MODEL_TYPES) {
    test(family, () => {
      const checkpoint = Checkpoint.open(join(shared, 'goldens', family));
      checkTensors(describeModel(checkpoint.config), checkpoint);
      checkpoint.dispose();
    });
  }

  test('the newer spelling of a config describes the same model', () => {
    const configs = SUPPORTED_MODEL_TYPES.map((family) =>
      readJson(join(shared, 'goldens', family, 'config.json')),
    );
    const older = configs.filter((config) => !('rope_parameters' in config));
    expect(older.length).toBeGreaterThan(4);
    for (const { rope_theta, rope_scaling, torch_dtype, ...rest } of older) {
      const { type, ...scaling } = (rope_scaling ?? { type: 'default' }) as { type: string };
      const newer = {
        ...rest,
        dtype: torch_dtype,
        rope_parameters: { ...scaling, rope_type: type, rope_theta },
      };
      expect(model(newer)).toEqual(model({ ...rest, rope_theta, rope_scaling, torch_dtype }));
    }
  });

  test('the trained model; another model_type over its weights', () => {
    const checkpoint = Checkpoint.open(join(shared, 'models/trio-moe-9m'));
    checkTensors(describeModel(checkpoint.config), checkpoint);
    const dir = join(root, 'changed');
    mkdirSync(dir);
    cpSync(join(shared, 'models/trio-moe-9m/model.safetensors'), join(dir, 'model.safetensors'));
    const config = readJson(join(shared, 'models/trio-moe-9m/config.json'));
    writeFileSync(join(dir, 'config.json'), JSON.stringify({ ...config, num_experts: 12 }));
    const changed = Checkpoint.open(dir);
    expectError(
      () => checkTensors(describeModel(changed.config), changed),
      'INVALID_TENSOR',
      'model.layers.0.mlp.gate.weight',
      '[16, 256]',
      '[12, 256]',
    );
  });
});
