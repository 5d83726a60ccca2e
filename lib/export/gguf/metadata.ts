/** A model's shape as GGUF metadata, and whether llama.cpp computes what the architecture says. */
import type { Architecture, AttentionSpec, LayerSpec, MoeSpec, RopeSpec } from '../../architecture';
import type { ModelConfig } from '../../checkpoint/config';
import { EacMoeError } from '../../errors';
import { GGUF_FAMILIES, type GgufFamily } from './families';
import type { GgufValue } from './writer';

function unsupported(config: ModelConfig, what: string): never {
  throw new EacMoeError(
    'UNSUPPORTED_MODEL',
    `${config.where}: ${what}; export it to gptq or compressed-tensors instead`,
  );
}

export function familyOf(config: ModelConfig): GgufFamily {
  const family = GGUF_FAMILIES.get(config.modelType);
  if (!family)
    unsupported(
      config,
      `model_type '${config.modelType}' cannot be written as gguf, only ${[...GGUF_FAMILIES.keys()].join(', ')}`,
    );
  return family;
}

/** Fails where llama.cpp's model of the family would compute something else. */
export function checkFamily(config: ModelConfig, architecture: Architecture, family: GgufFamily): void {
  const fail = (what: string): never => unsupported(config, `llama.cpp's '${family.arch}' ${what}`);
  const isMoe = architecture.layers.map(({ feedForward }) => feedForward.kind === 'moe');
  const first = isMoe.indexOf(true);
  if (first > 0 && !family.leadingDense) fail('has no layers without experts');
  if (isMoe.indexOf(false, first) >= 0) fail('has no layers without experts behind others');
  const slides = ({ attention: a }: LayerSpec, i: number) =>
    a.kind === 'grouped' && a.window > 0 === (i % 2 === 0);
  if (family.gptOss && !architecture.layers.every(slides)) fail('has a window in every other layer');
  for (const { attention, feedForward } of architecture.layers) {
    if (feedForward.activation !== (family.activation ?? 'silu'))
      fail(`has no activation '${feedForward.activation}'`);
    checkAttention(attention, family, fail);
    if (feedForward.kind === 'moe') checkRouter(feedForward.router, family, fail);
  }
}

function checkAttention(a: AttentionSpec, family: GgufFamily, fail: (what: string) => never): void {
  if ((a.kind === 'latent') !== Boolean(family.latent)) fail(`has no ${a.kind} attention`);
  if (a.kind === 'latent') {
    if (!a.rope.interleaved) fail('has neighbouring rotary pairs');
    return;
  }
  if (family.equalHeads && a.heads !== a.kvHeads) fail('has as many key heads as query heads');
  if (Boolean(a.sinks) !== Boolean(family.gptOss)) fail(`has ${a.sinks ? 'no ' : ''}attention sinks`);
}

function checkRouter(router: MoeSpec['router'], family: GgufFamily, fail: (what: string) => never): void {
  const sum =
    router.scoring === 'sparse-mixer' || family.renormalize === 'metadata'
      ? family.renormalize
      : router.renormalize;
  if (sum !== family.renormalize)
    fail(
      `${family.renormalize ? 'always divides' : 'never divides'} the chosen experts' weights by their sum`,
    );
  if (!family.scores && (router.scoring === 'sigmoid' || router.correction))
    fail('scores experts by a softmax alone');
  const groups = router.groups && router.groups.count > 1 ? router.groups : undefined;
  if (groups && !(family.latent && groups.best === 2)) fail('has no groups of experts like these');
  if (router.bias && !family.gptOss) fail('has no bias in its router');
}

/** The base under which these frequencies are base^(-2i / dim), times 1 / factor; undefined where they are not. */
export function ropeBase({ frequencies, dim }: RopeSpec): { base: number; factor: number } | undefined {
  const factor = 1 / frequencies[0]!;
  const last = frequencies.length - 1;
  if (last === 0) return { base: 10000, factor };
  const exact = (frequencies[last]! * factor) ** (-dim / (2 * last));
  // f32 frequencies know the base to 7 digits.
  const round = Number(exact.toPrecision(6));
  const base = Math.abs(round / exact - 1) < 1e-6 ? round : exact;
  const fits = frequencies.every((f, i) => Math.abs((f * factor) / base ** ((-2 * i) / dim) - 1) < 1e-5);
  return fits ? { base, factor } : undefined;
}

function ropeMetadata(config: ModelConfig, rope: RopeSpec, family: GgufFamily): Record<string, GgufValue> {
  const dimensions = { 'rope.dimension_count': rope.dim };
  const plain = ropeBase(rope);
  if (plain && !rope.long && rope.scale === 1) {
    const { base, factor } = plain;
    const result = { ...dimensions, 'rope.freq_base': { f32: base } };
    if (Math.abs(factor - 1) < 1e-6) return result;
    return { ...result, 'rope.scaling.type': 'linear', 'rope.scaling.factor': { f32: factor } };
  }
  if (rope.long && config.rope.theta !== undefined && rope.long.scale === rope.scale) {
    return {
      ...dimensions,
      'rope.freq_base': { f32: config.rope.theta },
      'rope.scaling.type': 'longrope',
      'rope.scaling.original_context_length': rope.long.from,
      'rope.scaling.attn_factor': { f32: rope.scale },
    };
  }
  const { theta, fields, type, originalMaxPositions } = config.rope;
  if (type === 'yarn' && family.yarn && theta !== undefined && originalMaxPositions) {
    return {
      ...dimensions,
      'rope.freq_base': { f32: theta },
      'rope.scaling.type': 'yarn',
      'rope.scaling.factor': { f32: fields.positiveNumber('factor') },
      'rope.scaling.original_context_length': originalMaxPositions,
      'rope.scaling.yarn_beta_fast': { f32: fields.positiveNumber('beta_fast', 32) },
      'rope.scaling.yarn_beta_slow': { f32: fields.positiveNumber('beta_slow', 1) },
    };
  }
  return unsupported(
    config,
    `a rotary embedding of type '${config.rope.type}' like this cannot be written as gguf`,
  );
}

function attentionMetadata(a: AttentionSpec): Record<string, GgufValue> {
  if (a.kind === 'grouped') {
    return {
      'attention.head_count': a.heads,
      'attention.head_count_kv': a.kvHeads,
      'attention.key_length': a.headDim,
      'attention.value_length': a.headDim,
    };
  }
  // Without key_length_mla llama.cpp takes the checkpoint's own matrices, whose rows quantized groups need, and caches keys and values.
  return {
    'attention.head_count': a.heads,
    'attention.head_count_kv': a.heads,
    'attention.key_length': a.nopeDim + a.ropeDim,
    'attention.value_length': a.valueDim,
    'attention.kv_lora_rank': a.rank,
    ...(a.qDown && { 'attention.q_lora_rank': a.qDown.out }),
  };
}

/** Everything but the tokenizer. `name`: for people. */
export function modelMetadata(
  config: ModelConfig,
  architecture: Architecture,
  family: GgufFamily,
  name: string,
): Record<string, GgufValue> {
  const { attention } = architecture.layers[0]!;
  const moe = architecture.layers.map((l) => l.feedForward).find((f) => f.kind === 'moe')!;
  const dense = architecture.layers.map((l) => l.feedForward).find((f) => f.kind === 'dense');
  const { router, experts, shared } = moe;
  const width = experts[0]!.up.out;
  const windows = architecture.layers.flatMap(({ attention: a }) =>
    a.kind === 'grouped' && a.window > 0 ? [a.window] : [],
  );
  const own: Record<string, GgufValue> = {
    // Within the smallest window there is none to see.
    context_length: family.gptOss
      ? architecture.maxPositions
      : Math.min(architecture.maxPositions, ...windows),
    ...(family.gptOss && { 'attention.sliding_window': windows[0]! }),
    embedding_length: architecture.hiddenSize,
    block_count: architecture.layers.length,
    feed_forward_length: dense?.up.out ?? config.positiveInteger('intermediate_size', width),
    vocab_size: architecture.vocabSize,
    ...attentionMetadata(attention),
    'attention.layer_norm_rms_epsilon': { f32: architecture.norm.eps },
    'attention.layer_norm_epsilon': { f32: architecture.norm.eps },
    ...ropeMetadata(config, attention.rope, family),
    expert_count: experts.length,
    expert_used_count: router.topK,
    expert_feed_forward_length: width,
    ...(shared && { expert_shared_feed_forward_length: shared.up.out }),
    ...(family.scores && { expert_gating_func: router.scoring === 'sigmoid' ? 2 : 1 }),
    ...(family.renormalize === 'metadata' && { expert_weights_norm: router.renormalize }),
    ...family.metadata?.(config, architecture),
  };
  return {
    'general.architecture': family.arch,
    'general.type': 'model',
    'general.name': name,
    'general.quantization_version': 2,
    ...Object.fromEntries(Object.entries(own).map(([key, value]) => [`${family.arch}.${key}`, value])),
  };
}
