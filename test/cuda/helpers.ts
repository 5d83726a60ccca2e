import { native } from '../../lib/native';

/** describe(), or a loud skip where no CUDA library opens or no device answers. */
export function describeOnCuda(title: string, body: () => void): void {
  const cuda = native().cuda();
  if (cuda.available) return describe(title, body);
  console.warn(`SKIPPED: ${title}: ${cuda.why}; npm run test:cuda runs these tests`);
  describe.skip(title, body);
}
