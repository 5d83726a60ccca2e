/** The tensors that an architecture is made of, and whether a checkpoint holds exactly these. */
import { WEIGHT_DTYPES } from '../checkpoint/dtypes';
import type { ModelConfig } from '../checkpoint/config';
import { moduleOf, quantizationOf, quantizedTensors, type Quantization } from '../checkpoint/quantized';
import { EacMoeError } from '../errors';
import type { Architecture, AttentionSpec, GluSpec, LayerSpec, LinearSpec, NormSpec } from './types';

export type TensorRole =
  | 'attention'
  | 'router'
  | 'expert'
  | 'shared'
  | 'dense'
  | 'norm'
  | 'embedding'
  | 'head'
  | 'bias'
  /** The output gate of a shared expert. */
  | 'gate';

export type Projection =
  | 'q'
  | 'k'
  | 'v'
  | 'o'
  /** Of latent attention: down to the latent vectors, and up from that of keys and values. */
  | 'q_a'
  | 'kv_a'
  | 'kv_b'
  | 'gate'
  | 'up'
  | 'down';

export interface RequiredTensor {
  name: string;
  shape: number[];
  role: TensorRole;
  layer?: number;
  /** Routed experts only. */
  expert?: number;
  /** Matrices of attention, experts, shared experts and dense layers: those that may be quantized. */
  projection?: Projection;
}

type Place = Omit<RequiredTensor, 'name' | 'shape'>;

function linearTensors(spec: LinearSpec, place: Place): RequiredTensor[] {
  const weight = { name: spec.weight, shape: [spec.out, spec.in], ...place };
  if (!spec.bias) return [weight];
  return [
    weight,
    {
      name: spec.bias,
      shape: [spec.out],
      role: 'bias',
      ...(place.layer === undefined ? {} : { layer: place.layer }),
    },
  ];
}

function normTensors(spec: NormSpec, layer?: number): RequiredTensor[] {
  const place: Place = { role: 'norm', ...(layer === undefined ? {} : { layer }) };
  const names = spec.bias ? [spec.weight, spec.bias] : [spec.weight];
  return names.map((name) => ({ name, shape: [spec.size], ...place }));
}

function gluTensors(spec: GluSpec, place: Place): RequiredTensor[] {
  return (['gate', 'up', 'down'] as const).flatMap((projection) =>
    linearTensors(spec[projection], { ...place, projection }),
  );
}

/** The linear layers of attention by their projection, in the order in which they are used. */
function attentionProjections(a: AttentionSpec): [Projection, LinearSpec][] {
  if (a.kind === 'grouped')
    return [
      ['q', a.q],
      ['k', a.k],
      ['v', a.v],
      ['o', a.o],
    ];
  return [
    ...(a.qDown ? [['q_a', a.qDown] as [Projection, LinearSpec]] : []),
    ['q', a.q],
    ['kv_a', a.kvDown],
    ['kv_b', a.kvUp],
    ['o', a.o],
  ];
}

export function attentionLinears(a: AttentionSpec): LinearSpec[] {
  return attentionProjections(a).map(([, spec]) => spec);
}

function attentionTensors(a: AttentionSpec, layer: number): RequiredTensor[] {
  const norms =
    a.kind === 'latent'
      ? [...(a.qDown ? [a.qDown.norm] : []), a.kvNorm]
      : a.norms
        ? [a.norms.q, a.norms.k]
        : [];
  const sinks = a.kind === 'grouped' ? a.sinks : undefined;
  return [
    ...attentionProjections(a).flatMap(([projection, spec]) =>
      linearTensors(spec, { role: 'attention', layer, projection }),
    ),
    ...norms.flatMap((norm) => normTensors(norm, layer)),
    ...(sinks ? [{ name: sinks, shape: [a.heads], role: 'bias' as const, layer }] : []),
  ];
}

/** The tensors of one layer, in the order in which they are used. */
export function layerTensors(spec: LayerSpec, layer: number): RequiredTensor[] {
  const { attention, feedForward } = spec;
  const before = [
    ...normTensors(spec.attentionNorm, layer),
    ...attentionTensors(attention, layer),
    ...normTensors(spec.feedForwardNorm, layer),
  ];
  if (feedForward.kind === 'dense') return [...before, ...gluTensors(feedForward, { role: 'dense', layer })];
  const { router, experts, shared } = feedForward;
  const { correction } = router;
  return [
    ...before,
    ...linearTensors(router, { role: 'router', layer }),
    ...(correction
      ? [{ name: correction.tensor, shape: correction.shape, role: 'bias' as const, layer }]
      : []),
    ...experts.flatMap((expert, e) => gluTensors(expert, { role: 'expert', layer, expert: e })),
    ...(shared ? gluTensors(shared, { role: 'shared', layer }) : []),
    ...(shared?.outputGate ? linearTensors(shared.outputGate, { role: 'gate', layer }) : []),
  ];
}

/** All tensors of a model, each once (a tied head is the embedding). */
export function requiredTensors(architecture: Architecture): RequiredTensor[] {
  const { vocabSize, hiddenSize, embedding, head, layers, norm } = architecture;
  return [
    { name: embedding.weight, shape: [vocabSize, hiddenSize], role: 'embedding' },
    ...layers.flatMap((layer, i) => layerTensors(layer, i)),
    ...normTensors(norm),
    ...linearTensors(head, { role: 'head' }).filter((t) => t.name !== embedding.weight),
  ];
}

/** What of a Checkpoint the check needs. */
export interface TensorSource {
  readonly dir: string;
  readonly config: ModelConfig;
  has(name: string): boolean;
  info(name: string): { dtype: string; shape: readonly number[] };
  names(): string[];
}

/** Buffers that old exports carry along: recomputed, never read. */
const IGNORED = [/\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$/, /\.attn\.(masked_)?bias$/];

const where = ({ role, layer, expert }: RequiredTensor): string =>
  [layer === undefined ? '' : `layer ${layer}, `, expert === undefined ? role : `expert ${expert}`].join('');

class TensorCheck {
  readonly used = new Set<string>();

  constructor(
    private readonly source: TensorSource,
    private readonly quantization: Quantization | null,
  ) {}

  fail(what: string): never {
    throw new EacMoeError('INVALID_TENSOR', `${this.source.dir}: ${what}`);
  }

  /** One tensor as stored: dtype and shape. */
  stored(name: string, dtypes: readonly string[], shape: readonly number[], need: RequiredTensor): void {
    if (!this.source.has(name)) this.fail(`tensor '${name}' (${where(need)}) is missing`);
    this.used.add(name);
    const info = this.source.info(name);
    if (!dtypes.includes(info.dtype)) {
      this.fail(`tensor '${name}' (${where(need)}) has dtype ${info.dtype}, expected ${dtypes.join(', ')}`);
    }
    if (info.shape.length !== shape.length || info.shape.some((n, i) => n !== shape[i])) {
      this.fail(
        `tensor '${name}' (${where(need)}) has shape [${info.shape.join(', ')}], expected [${shape.join(', ')}]`,
      );
    }
  }

  required(need: RequiredTensor): void {
    const module = moduleOf(need.name);
    if (!need.projection || !this.source.has(`${module}.qweight`)) {
      this.stored(need.name, WEIGHT_DTYPES, need.shape, need);
      return;
    }
    if (this.source.has(need.name))
      this.fail(`holds both '${need.name}' and '${module}.qweight'; one of them is stale`);
    const q = this.quantization?.of(module);
    if (!q)
      return this.fail(
        `holds '${module}.qweight' but quantization_config does not say how '${module}' is quantized`,
      );
    const [out, inputs] = need.shape as [number, number];
    for (const { name, dtype, shape, optional } of quantizedTensors(module, q, out, inputs)) {
      if (!optional || this.source.has(name)) this.stored(name, [dtype], shape, need);
    }
  }
}

/**
 * Checks a checkpoint against an architecture before any of it is used: every tensor is there, with its shape and a float dtype (or as
 * the four tensors of a quantized module), and none is left over. Fails with INVALID_TENSOR, naming the first that is wrong.
 */
export function checkTensors(architecture: Architecture, source: TensorSource): void {
  const check = new TensorCheck(source, quantizationOf(source.config));
  for (const need of requiredTensors(architecture)) check.required(need);
  const tied = architecture.head.weight === architecture.embedding.weight;
  // A tied head may be stored too; it is never read.
  const spare = source
    .names()
    .filter(
      (name) =>
        !check.used.has(name) &&
        !(tied && name === 'lm_head.weight') &&
        !IGNORED.some((pattern) => pattern.test(name)),
    );
  if (spare.length > 0) {
    const others = spare.length > 1 ? ` (and ${spare.length - 1} more)` : '';
    check.fail(
      `tensor '${spare[0]}'${others} belongs to no part of a ${architecture.modelType} model; the results would be wrong without it`,
    );
  }
}
