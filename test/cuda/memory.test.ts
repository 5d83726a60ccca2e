/** Device memory that runs out or is too small: in processes of their own, under the emulation's variables. */
import { statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { scratch } from '../checkpoint/helpers';
import { describeOnCuda, inProcess, testEmulated } from './helpers';

const bundled = join(__dirname, '../../models/trio-moe-9m');

/** The bundled model on the GPU: whole, and in the least memory that it can do with. */
const models = `
  const { MoeModel } = lib;
  const load = (gpuMemory) => MoeModel.load(${JSON.stringify(bundled)}, { device: 'cuda', gpuMemory });
  const { message } = await caught(() => load(1));
  const [least, stay, two, all] = message.match(/[\\d.]+(?= MB)/g).map(Number);
  const ids = Int32Array.from({ length: 24 }, (_, i) => 7 * i + 1);`;

describeOnCuda('device memory', () => {
  const dir = scratch();

  // 0.5 MB stay and 0.8 MB of scratch memory, of 3 MB.
  testEmulated('what calibration worked with goes back when it runs out', () => {
    const found = inProcess(
      { EAC_EMULATION_MEMORY: '3000000' },
      `const n = 256;
      const h = api.zeros('f32', [n, n], 'cuda');
      h.write(Float32Array.from({ length: n * n }, (_, i) => Number(i % (n + 1) === 0)));
      await api.factorHessian(h, 0.01, false);
      const large = api.zeros('u8', [2_200_000], 'cuda');
      const again = await caught(() => api.factorHessian(h, 0.01, false));
      const [size] = large.shape;
      large.dispose();
      await api.factorHessian(h, 0.01, false);
      return [size, again.code];`,
    );
    expect(found).toEqual([2_200_000, 'OUT_OF_MEMORY']);
  });

  // Its head is its embedding, and its last layer's experts come twice in the program.
  testEmulated('what a program uses several times is counted once', () => {
    const all = inProcess({}, `${models} return all;`) as number;
    const { size } = statSync(join(bundled, 'model.safetensors'));
    expect(all * 1e6).toBeLessThan(size);
    expect(all * 1e6).toBeGreaterThan(0.99 * size);
  });

  // A few tokens choose at most half of a layer's experts.
  testEmulated('staged experts are copied for many tokens, and read where they lie for few', () => {
    const copies = join(dir, 'copies');
    writeFileSync(copies, '');
    const [two, ...copied] = inProcess(
      { EAC_EMULATION_COPIES: copies },
      `${models}
      const { readFileSync } = require('fs');
      const lines = () => readFileSync(${JSON.stringify(copies)}, 'utf8').split('\\n').slice(0, -1).map(Number);
      const model = await load((least + 0.01) * 1e6);
      const copied = [lines()];
      await model.forward(ids);
      copied.push(lines());
      const cache = model.createCache();
      for (const id of ids.slice(0, 3)) await model.forward([id], { cache });
      copied.push(lines());
      return [two, ...copied];`,
    ) as [number, number[], number[], number[]];
    expect(copied[0]).toEqual([]);
    expect(copied[1]).toHaveLength(4); // layers
    for (const bytes of copied[1]!) expect(bytes / 1e6).toBeCloseTo(two / 2, 2);
    expect(copied[2]).toEqual(copied[1]);
  });
});
