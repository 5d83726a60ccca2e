/**
 * Formats below 16 bit in which full models are published. To us they are sources like any other: decoded to bf16 as they are read
 * (native/kernels/convert/convert.h).
 *
 * LAYOUT   fp8     <name>             F8_E4M3 [out, in]
 *                  <name>_scale_inv   F32, F16 or BF16 [ceil(out / b0), ceil(in / b1)], b = quantization_config.weight_block_size
 *          mxfp4   <name>_blocks      U8 [experts, out, in / 32, 16]
 *                  <name>_scales      U8 [experts, out, in / 32]
 *          Tensors that are stored as floats stay so: `modules_to_not_convert` is not needed to read them.
 */
import type { FieldReader } from './config';

export type PublishedFormat = 'fp8' | 'mxfp4';

/** The `quantization_config` of a checkpoint, under either of its names. */
export function quantizationFields(config: FieldReader): FieldReader | undefined {
  return config.object('quantization_config') ?? config.object('compression_config');
}

/** What config.json says about the source's format; null for plain floats and for what is no such format. */
export function publishedFormat(config: FieldReader): PublishedFormat | null {
  const method = quantizationFields(config)?.value('quant_method');
  return method === 'fp8' || method === 'mxfp4' ? method : null;
}

/** Rows and columns of an FP8 matrix that share a scale; [128, 128] where config.json is silent, as DeepSeek-V3 began. */
export function fp8BlockSize(config: FieldReader): [number, number] {
  const fields = quantizationFields(config);
  if (!fields?.has('weight_block_size')) return [128, 128];
  const size = fields.value('weight_block_size');
  const valid =
    Array.isArray(size) && size.length === 2 && size.every((n) => Number.isSafeInteger(n) && n > 0);
  if (!valid) fields.fail('weight_block_size', 'two positive integers, e.g. [128, 128]');
  return size as [number, number];
}
