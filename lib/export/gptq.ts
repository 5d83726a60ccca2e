/** Export to GPTQ: the same tensors, with zero points in the version asked for. */
import type { GptqVersion } from '../checkpoint/zeros';
import { passOn, type ExportJob } from './job';
import type { DirectoryContent } from './directory';

/**
 * LAYOUT   That of checkpoint/quantized.ts. `quantization_config` is the source's but for checkpoint_format: `sym` and the `dynamic` overrides
 *          mean the same in both versions. desc_act is false: groups are runs of channels, whatever order GPTQ went through them.
 */
export function gptqContent(job: ExportJob, version: GptqVersion): DirectoryContent {
  const { checkpoint, quantization, modules } = job;
  const raw = checkpoint.config.raw;
  const key = raw.quantization_config ? 'quantization_config' : 'compression_config';
  return {
    config: {
      ...raw,
      [key]: { ...(raw[key] as object), checkpoint_format: version === 1 ? 'gptq' : 'gptq_v2' },
    },
    convert(name) {
      const module = modules.get(name.replace(/\.qzeros$/, ''));
      if (!module || !name.endsWith('.qzeros') || version === (quantization?.version ?? 2))
        return passOn(job, name);
      const { dtype, shape } = checkpoint.info(name);
      return [{ name, dtype, shape, data: () => bytesOf(job.zeros(module, version)) }];
    },
  };
}

export function bytesOf(values: ArrayBufferView): Uint8Array {
  return new Uint8Array(values.buffer as ArrayBuffer, values.byteOffset, values.byteLength);
}
