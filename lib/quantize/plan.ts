/**
 * The bits plan: how many bits each matrix gets, and what that makes the model weigh.
 *
 * Quantized are the matrices of attention, experts, shared experts and dense layers. Routers, norms, biases, embeddings, the head and
 * the shared experts' gates never are. EAC-MoE's three settings: `bits` 2, 2.5 and 3 for the experts, 4 for attention; method and paper
 * call them by the average over all quantized matrices, 2.06, 2.54 and 3.03.
 */
import type { Architecture } from '../architecture';
import { requiredTensors, type Projection, type RequiredTensor } from '../architecture/tensors';
import { moduleOf, type ModuleQuantization } from '../checkpoint/quantized';
import { EacMoeError } from '../errors';

/** A matrix that a plan decides on. */
export interface PlannedModule {
  layer: number;
  role: 'attention' | 'expert' | 'shared' | 'dense';
  /** Routed experts only. */
  expert?: number;
  projection: Projection;
}

/** 2.5: the first half of the MoE layers (rounded down) at 3 bit, the others at 2. A function decides on every matrix; 16 leaves it as it is. */
export type BitsOption = 2 | 2.5 | 3 | 4 | ((module: PlannedModule) => 2 | 3 | 4 | 16);

/** 'experts': as many as the routed experts of the layer get; as the paper's memory figures count. */
export type SharedBits = 2 | 3 | 4 | 16 | 'experts';

export interface PlanOptions {
  /** Of the routed experts; or of everything, when a function. */
  bits: BitsOption;
  /** Default 4. */
  attentionBits?: 2 | 3 | 4 | 16;
  /** Of shared experts and of dense layers' MLPs; default: attentionBits. */
  sharedBits?: SharedBits;
  /** Input channels that share a scale; a multiple of 32; default 128. A last, shorter group takes what is left of a row. */
  groupSize?: number;
  /** Fixed zero point in the middle of the range; default false. */
  symmetric?: boolean;
}

/** Weight name -> quantization, or null for a matrix that stays at 16 bit. */
export type Plan = Map<string, ModuleQuantization | null>;

const QUANTIZED_ROLES: ReadonlySet<string> = new Set(['attention', 'expert', 'shared', 'dense']);

function choose<T>(name: string, value: T, allowed: readonly unknown[], what: string): T {
  if (!allowed.includes(value)) {
    const found = typeof value === 'string' ? `'${value}'` : String(value);
    throw new EacMoeError('INVALID_ARGUMENT', `${name} must be ${what}; found ${found}`);
  }
  return value;
}

function checkOptions(options: PlanOptions): Required<PlanOptions> {
  const { bits, attentionBits = 4, groupSize = 128, symmetric = false } = options;
  const { sharedBits = attentionBits } = options;
  if (typeof bits !== 'function') choose('bits', bits, [2, 2.5, 3, 4], '2, 2.5, 3, 4 or a function');
  choose('attentionBits', attentionBits, [2, 3, 4, 16], '2, 3, 4 or 16');
  choose('sharedBits', sharedBits, [2, 3, 4, 16, 'experts'], "2, 3, 4, 16 or 'experts'");
  choose('symmetric', symmetric, [true, false], 'true or false');
  if (!Number.isSafeInteger(groupSize) || groupSize <= 0 || groupSize % 32 !== 0) {
    throw new EacMoeError(
      'INVALID_ARGUMENT',
      `groupSize must be a positive multiple of 32, e.g. 32, 64 or 128; found ${groupSize}`,
    );
  }
  return { bits, attentionBits, sharedBits, groupSize, symmetric };
}

/** Bits of the routed experts by layer; a dense layer counts with the MoE layer that follows it. */
function expertBits(architecture: Architecture, bits: 2 | 2.5 | 3 | 4): number[] {
  const moeLayers = architecture.layers.filter((layer) => layer.feedForward.kind === 'moe').length;
  const wide = Math.floor(moeLayers / 2);
  let before = 0;
  return architecture.layers.map((layer) => {
    const position = Math.min(before, moeLayers - 1);
    if (layer.feedForward.kind === 'moe') before++;
    return bits === 2.5 ? (position < wide ? 3 : 2) : bits;
  });
}

function describeModule(tensor: RequiredTensor): PlannedModule {
  const { layer, role, expert, projection } = tensor;
  return {
    layer: layer!,
    role: role as PlannedModule['role'],
    ...(expert === undefined ? {} : { expert }),
    projection: projection!,
  };
}

/** The matrices that a plan decides on, in the order of the layers. */
function plannedTensors(architecture: Architecture): RequiredTensor[] {
  return requiredTensors(architecture).filter(
    (t) => t.projection !== undefined && QUANTIZED_ROLES.has(t.role),
  );
}

/** Bits for every matrix that may be quantized. */
export function makePlan(architecture: Architecture, options: PlanOptions): Plan {
  const { bits, attentionBits, sharedBits, groupSize, symmetric } = checkOptions(options);
  const ofExperts = typeof bits === 'function' ? [] : expertBits(architecture, bits);
  const bitsOf = (tensor: RequiredTensor): number => {
    if (typeof bits === 'function') {
      const module = describeModule(tensor);
      return choose(
        `bits, called with ${JSON.stringify(module)},`,
        bits(module),
        [2, 3, 4, 16],
        '2, 3, 4 or 16',
      );
    }
    if (tensor.role === 'attention') return attentionBits;
    if (tensor.role === 'expert' || sharedBits === 'experts') return ofExperts[tensor.layer!]!;
    return sharedBits;
  };
  return new Map(
    plannedTensors(architecture).map((tensor) => {
      const b = bitsOf(tensor);
      return [tensor.name, b === 16 ? null : { bits: b, groupSize, symmetric }];
    }),
  );
}

/**
 * The plan by module name, with the linear layers that are never quantized as null: what `quantizationConfig` of
 * checkpoint/quantized.ts takes.
 */
export function planModules(architecture: Architecture, plan: Plan): Map<string, ModuleQuantization | null> {
  const modules = new Map<string, ModuleQuantization | null>();
  for (const { name, role } of requiredTensors(architecture)) {
    if (plan.has(name)) modules.set(moduleOf(name), plan.get(name)!);
    else if (role === 'router' || role === 'gate') modules.set(moduleOf(name), null);
  }
  return modules;
}

export interface SizeEstimate {
  /** Of the weights as the plan has them. */
  bytes: number;
  /** With everything at 16 bit. */
  bytesAt16Bit: number;
  /** Bits a weight, over the matrices that the plan covers; how the paper counts (2.06, 2.54, 3.03). */
  averageBits: number;
  /** The same with scales and zero points. */
  averageBitsWithOverhead: number;
  parameters: number;
  /** What one token uses: all but the experts that are not chosen. */
  activeParameters: number;
  /** In matrices that the plan quantizes. */
  quantizedParameters: number;
}

/** Bits of an [out, in] matrix: codes, and per row and group an f16 scale and, unless symmetric, a zero point of as many bits as a code. */
function matrixBits(q: ModuleQuantization, out: number, inputs: number): number {
  const groups = out * Math.ceil(inputs / q.groupSize);
  return out * inputs * q.bits + groups * (16 + (q.symmetric ? 0 : q.bits));
}

/** What a model weighs under a plan, from its architecture alone. */
export function estimateSize(architecture: Architecture, plan: Plan): SizeEstimate {
  let [totalBits, parameters, active, quantized] = [0, 0, 0, 0];
  let [planned, plannedBits, plannedTotalBits] = [0, 0, 0];
  for (const tensor of requiredTensors(architecture)) {
    const size = tensor.shape.reduce((a, b) => a * b, 1);
    const q = plan.get(tensor.name);
    const bits = q ? matrixBits(q, tensor.shape[0]!, tensor.shape[1]!) : 16 * size;
    parameters += size;
    totalBits += bits;
    if (q) quantized += size;
    if (plan.has(tensor.name)) {
      planned += size;
      plannedBits += size * (q?.bits ?? 16);
      plannedTotalBits += bits;
    }
    const feedForward =
      tensor.expert === undefined ? undefined : architecture.layers[tensor.layer!]!.feedForward;
    active +=
      feedForward?.kind === 'moe' ? (size * feedForward.router.topK) / feedForward.experts.length : size;
  }
  return {
    bytes: Math.ceil(totalBits / 8),
    bytesAt16Bit: 2 * parameters,
    averageBits: planned > 0 ? plannedBits / planned : 16,
    averageBitsWithOverhead: planned > 0 ? plannedTotalBits / planned : 16,
    parameters,
    activeParameters: Math.round(active),
    quantizedParameters: quantized,
  };
}
