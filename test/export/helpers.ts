/** Quantized models to export, and a reader of compressed-tensors written from its definition. */
import { join } from 'node:path';
import { quantizeCheckpoint } from '../../lib/quantize';
import type { QuantizeOptions } from '../../lib/quantize/options';
import { TRIO } from '../quantize/helpers';

/** Rounds a model (by default the bundled one) to nearest: seconds, no calibration. Returns its directory. */
export async function rounded(
  dir: string,
  name: string,
  options: Partial<QuantizeOptions> = {},
  source = TRIO,
): Promise<string> {
  const output = join(dir, name);
  await quantizeCheckpoint(source, { output, method: 'rtn', router: false, ...options });
  return output;
}
