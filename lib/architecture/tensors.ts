/** The tensors that an architecture is made of, and whether a checkpoint holds exactly these. */
import { WEIGHT_DTYPES } from '../checkpoint/dtypes';
import type { ModelConfig } from '../checkpoint/config';
import { moduleOf, quantizationOf, quantizedTensors, type Quantization } from '../checkpoint/quantized';
import { EacMoeError } from '../errors';
import { biasOf, storageOf, weightOf, type Wanted } from './storage';
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

/** One logical tensor; `storageOf` tells how a checkpoint holds it. */
export interface RequiredTensor extends Wanted {
  role: TensorRole;
  layer?: number;
  /** Of routed experts, their biases too. */
  expert?: number;
  /** Matrices of attention, experts, shared experts and dense layers: those that may be quantized. */
  projection?: Projection;
}

type Place = Omit<RequiredTensor, keyof Wanted>;

function linearTensors(spec: LinearSpec, place: Place): RequiredTensor[] {
  const bias = biasOf(spec);
  const { layer, expert } = place;
  return [
    { ...weightOf(spec), ...place },
    ...(bias
      ? [
          {
            ...bias,
            role: 'bias' as const,
            ...(layer === undefined ? {} : { layer }),
            ...(expert === undefined ? {} : { expert }),
          },
        ]
      : []),
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

/** Layers that predict tokens further ahead (multi-token prediction), behind those of the model: nothing else uses them. */
function isPredictionLayer(name: string, { config }: TensorSource, layers: number): boolean {
  if (/^(model\.)?mtp\./.test(name)) return true;
  const layer = Number(/^model\.layers\.(\d+)\./.exec(name)?.[1] ?? -1);
  const extra = ['num_nextn_predict_layers', 'num_mtp_modules'].map((key) =>
    config.nonNegativeInteger(key, 0),
  );
  return layer >= layers && layer < layers + Math.max(...extra);
}

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
    if (need.projection && this.source.has(`${module}.qweight`)) this.quantized(need, module);
    else this.unquantized(need);
  }

  /** Under its own name, as floats or FP8, or in a tensor of several experts, as floats or MXFP4. */
  unquantized(need: RequiredTensor): void {
    const storage = storageOf(this.source, need);
    if (!storage) {
      const fused = need.fused && `, and so is '${need.fused.tensor}', which could hold it`;
      return this.fail(`tensor '${need.name}' (${where(need)}) is missing${fused ?? ''}`);
    }
    if (storage.kind === 'fp8' && !need.projection) this.stored(need.name, WEIGHT_DTYPES, need.shape, need);
    for (const { name, dtypes, shape } of storage.tensors) this.stored(name, dtypes, shape, need);
  }

  quantized(need: RequiredTensor, module: string): void {
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
 * Checks a checkpoint against an architecture before any of it is used: every tensor is there in a form that can be read (see storage.ts,
 * or the four tensors of a quantized module), with its shape and dtype, and none is left over but known extras. Fails with INVALID_TENSOR,
 * naming the first that is wrong.
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
        !IGNORED.some((pattern) => pattern.test(name)) &&
        !isPredictionLayer(name, source, architecture.layers.length),
    );
  if (spare.length > 0) {
    const others = spare.length > 1 ? ` (and ${spare.length - 1} more)` : '';
    check.fail(
      `tensor '${spare[0]}'${others} belongs to no part of a ${architecture.modelType} model; the results would be wrong without it`,
    );
  }
}
