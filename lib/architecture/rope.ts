/**
 * Rotary position embeddings: from config.json to inverse frequencies.
 *
 * DEFINITION  default   f_i = theta^(-2i / dim)
 *             linear    f_i / factor
 *             longrope  f_i / short_factor_i up to the original length, f_i / long_factor_i beyond; cos and sin scaled
 *                       (LongRoPE, arXiv 2402.13753; Phi-3.5-MoE gives the scales as short_mscale and long_mscale)
 *             yarn      between f_i and f_i / factor, by wavelength; cos and sin scaled (YaRN, arXiv 2309.00071)
 * Each step is rounded to f32 as PyTorch does, so that angles agree at large positions too.
 */
import type { ModelConfig, RopeConfig } from '../checkpoint/config';
import { EacMoeError } from '../errors';
import type { RopeSpec } from './types';

const SUPPORTED = ['default', 'linear', 'longrope', 'yarn'];
const f32 = Math.fround;

function powers(theta: number, dim: number): number[] {
  return Array.from({ length: dim / 2 }, (_, i) => f32(Math.pow(theta, f32((2 * i) / dim))));
}

function scaledFrequencies(theta: number, dim: number, factors: number[]): number[] {
  return powers(theta, dim).map((power, i) => f32(1 / f32(f32(factors[i]!) * power)));
}

function originalPositions(rope: RopeConfig): number {
  return rope.originalMaxPositions ?? rope.fields.positiveInteger('original_max_position_embeddings');
}

function longrope(config: ModelConfig, theta: number, dim: number): Omit<RopeSpec, 'dim' | 'interleaved'> {
  const { fields } = config.rope;
  const original = originalPositions(config.rope);
  const extension = fields.positiveNumber(
    'factor',
    config.positiveInteger('max_position_embeddings') / original,
  );
  const implied = extension <= 1 ? 1 : Math.sqrt(1 + Math.log(extension) / Math.log(original));
  const attention = fields.positiveNumber('attention_factor', implied);
  return {
    frequencies: scaledFrequencies(theta, dim, fields.positiveNumbers('short_factor', dim / 2)),
    scale: fields.positiveNumber('short_mscale', attention),
    long: {
      frequencies: scaledFrequencies(theta, dim, fields.positiveNumbers('long_factor', dim / 2)),
      scale: fields.positiveNumber('long_mscale', attention),
      from: original,
    },
  };
}

function yarn(config: ModelConfig, theta: number, dim: number): Omit<RopeSpec, 'dim' | 'interleaved'> {
  const { fields } = config.rope;
  const original = originalPositions(config.rope);
  const factor = fields.positiveNumber(
    'factor',
    config.positiveInteger('max_position_embeddings') / original,
  );
  const mscale = (weight: number): number => (factor <= 1 ? 1 : 0.1 * weight * Math.log(factor) + 1);
  const [m, all] = [fields.nonNegativeNumber('mscale', 0), fields.nonNegativeNumber('mscale_all_dim', 0)];
  const implied = m > 0 && all > 0 ? mscale(m) / mscale(all) : mscale(1);
  // The channels where a full turn happens `rotations` times within the original length.
  const channel = (rotations: number): number =>
    (dim * Math.log(original / (rotations * 2 * Math.PI))) / (2 * Math.log(theta));
  const truncate = fields.boolean('truncate', true);
  const low = channel(fields.positiveNumber('beta_fast', 32));
  const high = channel(fields.positiveNumber('beta_slow', 1));
  const from = Math.max(truncate ? Math.floor(low) : low, 0);
  const to = Math.min(truncate ? Math.ceil(high) : high, dim - 1);
  const frequencies = powers(theta, dim).map((power, i) => {
    const ramp = Math.min(1, Math.max(0, (i - from) / (to === from ? 0.001 : to - from)));
    return f32(f32(1 / f32(factor * power)) * ramp + f32(1 / power) * (1 - ramp));
  });
  return { frequencies, scale: fields.positiveNumber('attention_factor', implied) };
}

/**
 * The softmax scale of yarn models that give `mscale_all_dim`, relative to the plain one: the square of YaRN's attention factor
 * (DeepSeek-V2's and V3's published code).
 */
export function yarnScale(config: ModelConfig): number {
  const { type, fields } = config.rope;
  const all = type === 'default' ? 0 : fields.nonNegativeNumber('mscale_all_dim', 0);
  const factor = all > 0 ? fields.positiveNumber('factor') : 1;
  return factor <= 1 ? 1 : (0.1 * all * Math.log(factor) + 1) ** 2;
}

/**
 * The rotary embedding of heads of `headDim` channels. `defaultTheta` is the family's, for a config.json that gives none; `rotaryDim` the
 * channels that turn, where config.json does not say it by `partial_rotary_factor`.
 */
export function ropeSpec(
  config: ModelConfig,
  headDim: number,
  defaultTheta = 10000,
  rotaryDim?: number,
): RopeSpec {
  const { type, fields } = config.rope;
  const theta = config.rope.theta ?? defaultTheta;
  const partial = fields.positiveNumber(
    'partial_rotary_factor',
    config.positiveNumber('partial_rotary_factor', 1),
  );
  const dim = rotaryDim ?? Math.trunc(headDim * partial);
  if (dim % 2 !== 0 || dim === 0 || dim > headDim) {
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${config.where}: rotary embedding over ${dim} of ${headDim} channels; expected an even number of at most ${headDim}`,
    );
  }
  const plain = powers(theta, dim).map((power) => f32(1 / power));
  if (type === 'default') return { dim, interleaved: false, frequencies: plain, scale: 1 };
  if (type === 'linear') {
    const factor = fields.positiveNumber('factor');
    return { dim, interleaved: false, frequencies: plain.map((f) => f32(f / factor)), scale: 1 };
  }
  if (type === 'dynamic' && fields.has('alpha')) {
    // Hunyuan's: as if trained with a larger base, at every length.
    const base = theta * Math.pow(fields.positiveNumber('alpha'), dim / (dim - 2));
    const frequencies = powers(base, dim).map((power) => f32(1 / power));
    return { dim, interleaved: false, frequencies, scale: 1 };
  }
  if (type === 'longrope') return { dim, interleaved: false, ...longrope(config, theta, dim) };
  if (type === 'yarn') return { dim, interleaved: false, ...yarn(config, theta, dim) };
  throw new EacMoeError(
    'UNSUPPORTED_MODEL',
    `${config.where}: rotary embedding of type '${type}' is not supported; supported are ${SUPPORTED.join(', ')}`,
  );
}
