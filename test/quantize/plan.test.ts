import { join } from 'node:path';
import { describe as describeModel, type Architecture } from '../../lib/architecture';
import { normaliseConfig } from '../../lib/checkpoint/config';
import { quantizationConfig, quantizationOf } from '../../lib/checkpoint/quantized';
import {
  estimateSize,
  makePlan,
  planModules,
  type BitsOption,
  type PlannedModule,
} from '../../lib/quantize/plan';
import { expectError, readJson } from '../checkpoint/helpers';

const load = (name: string): Architecture =>
  describeModel(normaliseConfig(readJson(join(__dirname, '../fixtures', `${name}.json`))));

/** EAC-MoE's memory in decimal GB: at 16 bit, and with the experts at 3 bit (3.03 on average). */
const MEMORY = {
  'mixtral-8x7b': [93.41, 18.98],
  'phi-3.5-moe': [83.75, 17.08],
  'deepseek-moe-16b': [32.75, 7.19],
  'qwen1.5-moe-a2.7b': [28.63, 6.69],
} as const;

test.each(Object.entries(MEMORY))('the published memory of %s', (name, [full, compressed]) => {
  const architecture = load(name);
  // The figures hold with shared experts and the dense layer at the experts' bits.
  const size = estimateSize(architecture, makePlan(architecture, { bits: 3, sharedBits: 'experts' }));
  expect(Math.abs(size.bytesAt16Bit / 1e9 / full - 1)).toBeLessThan(0.0005);
  expect(Math.abs(size.bytes / 1e9 / compressed - 1)).toBeLessThan(0.001);
});

test.each(Object.keys(MEMORY))('the published average bits of %s', (name) => {
  const architecture = load(name);
  // The paper names one figure for all models; attention's share differs a little between them, and half of 27 layers is 13.
  for (const [bits, published] of [
    [2, 2.06],
    [2.5, 2.54],
    [3, 3.03],
  ] as const) {
    const { averageBits, averageBitsWithOverhead } = estimateSize(
      architecture,
      makePlan(architecture, { bits, sharedBits: 'experts' }),
    );
    expect(Math.abs(averageBits - published)).toBeLessThan(0.015);
    // A group of 128 adds 16 bits and a zero point.
    expect(averageBitsWithOverhead - averageBits).toBeCloseTo((16 + averageBits) / 128, 2);
  }
});

test('parameters, whole and active', () => {
  const of = (name: string) => {
    const architecture = load(name);
    return estimateSize(architecture, makePlan(architecture, { bits: 3 }));
  };
  expect(of('mixtral-8x7b').parameters / 1e9).toBeCloseTo(46.7, 1);
  expect(of('mixtral-8x7b').activeParameters / 1e9).toBeCloseTo(12.9, 1);
  expect(of('qwen1.5-moe-a2.7b').activeParameters / 1e9).toBeCloseTo(2.7, 1);
  expect(of('deepseek-moe-16b').activeParameters / 1e9).toBeCloseTo(2.83, 1);
});

test('which matrices get how many bits', () => {
  const architecture = load('deepseek-moe-16b');
  const plan = makePlan(architecture, { bits: 2.5, groupSize: 64 });
  const bits = (name: string) => plan.get(`model.layers.${name}.weight`)?.bits;
  expect([1, 13, 14, 27].map((l) => bits(`${l}.mlp.experts.0.up_proj`))).toEqual([3, 3, 2, 2]);
  expect(bits('0.mlp.gate_proj')).toBe(4);
  expect(bits('20.mlp.shared_experts.down_proj')).toBe(4);
  expect(bits('5.self_attn.o_proj')).toBe(4);
  expect(plan.get('model.layers.1.mlp.experts.63.down_proj.weight')).toEqual({
    bits: 2 + 1,
    groupSize: 64,
    symmetric: false,
  });
  for (const name of ['1.mlp.gate', '0.input_layernorm'])
    expect(plan.has(`model.layers.${name}.weight`)).toBe(false);
  expect([plan.has('lm_head.weight'), plan.has('model.embed_tokens.weight')]).toEqual([false, false]);
  const other = makePlan(architecture, {
    bits: 2.5,
    attentionBits: 16,
    sharedBits: 'experts',
    symmetric: true,
  });
  expect(other.get('model.layers.0.self_attn.q_proj.weight')).toBeNull();
  expect(other.get('model.layers.0.mlp.up_proj.weight')).toEqual({
    bits: 3,
    groupSize: 128,
    symmetric: true,
  });
  expect(other.get('model.layers.27.mlp.shared_experts.up_proj.weight')?.bits).toBe(2);
});

test('a function decides on every matrix', () => {
  const architecture = load('qwen1.5-moe-a2.7b');
  const seen: PlannedModule[] = [];
  const plan = makePlan(architecture, {
    bits: (module) => {
      seen.push(module);
      return module.expert === 7 ? 16 : module.role === 'attention' ? 4 : 2;
    },
  });
  expect(seen.length).toBe(plan.size);
  expect(seen[0]).toEqual({ layer: 0, role: 'attention', projection: 'q' });
  expect(plan.get('model.layers.3.mlp.experts.7.up_proj.weight')).toBeNull();
  expect(plan.get('model.layers.3.mlp.shared_expert.up_proj.weight')?.bits).toBe(2);
});

test('the plan survives the trip through quantization_config', () => {
  const architecture = load('qwen1.5-moe-a2.7b');
  const modules = planModules(architecture, makePlan(architecture, { bits: 2.5 }));
  const quantization_config = quantizationConfig(modules, 'eac-moe:0');
  const read = quantizationOf(normaliseConfig({ model_type: 'qwen2_moe', quantization_config }))!;
  for (const [module, value] of modules) expect(read.of(module)).toEqual(value);
  expect(read.of('model.layers.0.mlp.gate')).toBeNull();
  expect(read.of('model.layers.0.mlp.shared_expert_gate')).toBeNull();
  expect(JSON.stringify(quantization_config).length).toBeLessThan(4000);
});

test('wrong options are named', () => {
  const architecture = load('mixtral-8x7b');
  const plan = (options: object) => () => makePlan(architecture, { bits: 3, ...options });
  expectError(plan({ bits: 5 }), 'INVALID_ARGUMENT', 'bits must be 2, 2.5, 3, 4', 'found 5');
  expectError(plan({ bits: '3' }), 'INVALID_ARGUMENT', "found '3'");
  expectError(plan({ bits: NaN }), 'INVALID_ARGUMENT', 'found NaN');
  expectError(
    plan({ bits: (() => 5) as unknown as BitsOption }),
    'INVALID_ARGUMENT',
    'bits, called with',
    'found 5',
  );
  expectError(plan({ attentionBits: 8 }), 'INVALID_ARGUMENT', 'attentionBits', 'found 8');
  expectError(plan({ sharedBits: 'x' }), 'INVALID_ARGUMENT', 'sharedBits', "'experts'", "found 'x'");
  for (const groupSize of [0, -128, 100, 1.5, NaN, '128'])
    expectError(plan({ groupSize }), 'INVALID_ARGUMENT', 'groupSize', `found ${groupSize}`);
  expectError(plan({ symmetric: 1 }), 'INVALID_ARGUMENT', 'symmetric');
});
