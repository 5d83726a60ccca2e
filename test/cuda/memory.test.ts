/** Device memory that runs out: in a process of its own, whose emulated GPU has little. */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { describeOnCuda } from './helpers';

const root = join(__dirname, '../..');
const emulated = process.env.EAC_MOE_CUDA?.includes('emulated') ?? false;

describeOnCuda('device memory', () => {
  // 0.5 MB stay and 0.8 MB of scratch memory, of 3 MB.
  (emulated ? test : test.skip)('what calibration worked with goes back when it runs out', () => {
    const script = `
      const { native } = require(${JSON.stringify(join(root, 'dist/native'))});
      (async () => {
        const api = native(), n = 256;
        const h = api.zeros('f32', [n, n], 'cuda');
        h.write(Float32Array.from({ length: n * n }, (_, i) => Number(i % (n + 1) === 0)));
        const factor = await api.factorHessian(h, 0.01, false);
        const large = api.zeros('u8', [2_200_000], 'cuda');
        const again = await api.factorHessian(h, 0.01, false).catch(({ code }) => code);
        const [size] = large.shape;
        large.dispose();
        await api.factorHessian(h, 0.01, false);
        console.log(JSON.stringify([size, again]));
      })().catch(({ code, message }) => console.log(JSON.stringify([code, message])));`;
    const env = { ...process.env, EAC_EMULATION_MEMORY: '3000000' };
    const { stdout, stderr } = spawnSync(process.execPath, ['-e', script], { env, encoding: 'utf8' });
    expect(stderr).toBe('');
    expect(JSON.parse(stdout)).toEqual([2_200_000, 'OUT_OF_MEMORY']);
  });
});
