/** What waits for what: in processes of their own, whose emulated GPU works as late as it may, or as early, or fails for good. */
import { join } from 'node:path';
import { scratch } from '../checkpoint/helpers';
import { describeOnCuda, inProcess, testEmulated } from './helpers';

const bundled = JSON.stringify(join(__dirname, '../../models/trio-moe-9m'));

describeOnCuda('the queue', () => {
  const dir = scratch();

  // The first operation is queued when the second throws.
  testEmulated('nothing outlives a run that throws', () => {
    const found = inProcess(
      { EAC_EMULATION_QUEUE: 'late' },
      `const router = { scoring: 'softmax', experts: 4, topK: 2, renormalize: false, scale: 1, jitter: 0 };
      const register = (width, dtype) => ({ width, dtype, rows: 'tokens' });
      const registers = [register(8, 'f32'), register(4, 'f32'), register(2, 'f32'), register(2, 'i32'), register(4, 'i32')];
      const program = api.createProgram(registers, [
        { op: 'scale', x: 0, scale: 2 },
        { op: 'reselect', logits: 1, weights: 2, indices: 3, counts: 4, router },
      ], 'cuda');
      const frame = api.createFrame(program);
      const x = api.zeros('f32', [3, 8], 'cuda');
      frame.bind(0, x);
      frame.begin(null, [{ length: 3 }]);
      frame.setPruning({ mode: 'drop', mask: new Uint8Array(1) });
      const { message } = await caught(() => frame.run(0, 2));
      x.write(new Float32Array(24).fill(1));
      frame.dispose();
      return [message, Math.max(...x.toArray())];`,
    );
    expect(found).toEqual([expect.stringContaining('expert mask'), 1]);
  });

  // A copy that came too late would leave another layer's experts or NaN, one that came too early, the next layer's.
  testEmulated.each(['late', 'early'])('staged experts are there when they are needed: copies %s', (when) => {
    const found = inProcess(
      { EAC_EMULATION_QUEUE: when },
      `const load = (gpuMemory) => lib.MoeModel.load(${bundled}, { device: 'cuda', gpuMemory });
      const { message } = await caught(() => load(1));
      const whole = await load(), staged = await load((Number(/at least ([\\d.]+) MB/.exec(message)[1]) + 0.01) * 1e6);
      const ids = Int32Array.from({ length: 9 }, (_, i) => 7 * i + 1);
      const forward = async (model) => (await model.forward(ids)).logits;
      const [a, b, c] = [await forward(whole), ...(await Promise.all([forward(staged), forward(staged)]))];
      const same = (v) => v.every((x, i) => x === a[i]);
      return [a.length / ids.length, same(b), same(c)];`,
    );
    expect(found).toEqual([4096, true, true]);
  });

  testEmulated(
    "after an error that stays, the CPU works, 'cuda' says what happened and 'auto' takes the CPU",
    () => {
      const lost = join(dir, 'lost');
      const found = inProcess(
        { EAC_EMULATION_LOST: lost },
        `const warnings = [];
      process.on('warning', ({ code, message }) => warnings.push({ code, message }));
      const load = (device) => lib.MoeModel.load(${bundled}, { device });
      const gpu = await load('cuda'), before = await load('cpu');
      const ids = [1, 2, 3];
      await gpu.forward(ids);
      require('fs').writeFileSync(${JSON.stringify(lost)}, '');
      const errors = [await caught(() => gpu.forward(ids)), await caught(() => gpu.forward(ids)), await caught(() => load('cuda'))];
      const auto = await load('auto');
      const same = String((await auto.forward(ids)).logits) === String((await before.forward(ids)).logits);
      gpu.dispose();
      return { errors, device: auto.device, same, warnings };`,
      );
      const message = expect.stringMatching(
        /illegal memory access.*this process cannot use the GPU any more/,
      ) as string;
      expect(found).toEqual({
        errors: Array(3).fill({ code: 'DEVICE', message }),
        device: 'cpu',
        same: true,
        warnings: [{ code: 'EAC_MOE_CUDA', message }],
      });
    },
  );
});
