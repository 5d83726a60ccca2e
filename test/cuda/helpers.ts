import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { native } from '../../lib/native';

const root = join(__dirname, '../..');

/** Whether the kernels run on the CPU (test/native/cuda/emulation), whose environment variables tests may set. */
const emulated = process.env.EAC_MOE_CUDA?.includes('emulated') ?? false;

export const testEmulated = emulated ? test : test.skip;

/** describe(), or a loud skip where no CUDA library opens or no device answers. */
export function describeOnCuda(title: string, body: () => void): void {
  const cuda = native().cuda();
  if (cuda.available) return describe(title, body);
  console.warn(`SKIPPED: ${title}: ${cuda.why}; npm run test:cuda runs these tests`);
  describe.skip(title, body);
}

/**
 * What an async function body returns in a process of its own, under this environment. It sees the package as `lib`, its native binding as `api`,
 * and `caught(f)`: the code of f's error, and its message.
 */
export function inProcess(environment: Record<string, string>, body: string): unknown {
  const script = `
    const lib = require(${JSON.stringify(join(root, 'dist'))});
    const api = require(${JSON.stringify(join(root, 'dist/native'))}).native();
    const caught = async (f) => {
      try { await f(); } catch ({ code, message }) { return { code, message }; }
    };
    (async () => { ${body} })().then(
      (value) => console.log(JSON.stringify(value)),
      ({ code, message, stack }) => console.log(JSON.stringify({ code, message, stack })),
    );`;
  const env = { ...process.env, ...environment };
  const args = ['--no-warnings', '-e', script];
  const { stdout, stderr } = spawnSync(process.execPath, args, { env, encoding: 'utf8' });
  expect(stderr).toBe('');
  return JSON.parse(stdout);
}
