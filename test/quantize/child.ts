/** A process to kill: quantizes what its argument says, printing its progress, a line of JSON a step. */
import { quantizeCheckpoint } from '../../lib/quantize';
import type { QuantizeOptions } from '../../lib/quantize/options';

const { source, options } = JSON.parse(process.argv[2]!) as { source: string; options: QuantizeOptions };

quantizeCheckpoint(source, {
  ...options,
  onProgress: (progress) => process.stdout.write(`${JSON.stringify(progress)}\n`),
}).catch((error: unknown) => {
  console.error(error);
  process.exitCode = 1;
});
