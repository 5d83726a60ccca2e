/** Devices that cannot be used, on any machine: each case in a process of its own, because a library is opened once. */
import { spawnSync } from 'node:child_process';
import { copyFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { scratch } from '../checkpoint/helpers';

const root = join(__dirname, '../..');
const bundled = join(root, 'models/trio-moe-9m');
const dir = scratch();

/** What loading the bundled model three times comes to, where EAC_MOE_CUDA names this file and its GPU has this trouble. */
function load(device: string, library: string, trouble: string): { loaded: unknown[]; warnings: unknown[] } {
  const script = `
    const { MoeModel } = require(${JSON.stringify(join(root, 'dist'))});
    const warnings = [];
    process.on('warning', ({ code, message }) => warnings.push({ code, message }));
    const load = () => MoeModel.load(${JSON.stringify(bundled)}, { device: '${device}' }).then(
      (model) => model.forward([1, 2, 3]).then(() => ({ device: model.device })),
      ({ code, message }) => ({ code, message }),
    );
    (async () => console.log(JSON.stringify({ loaded: [await load(), await load(), await load()], warnings })))();`;
  const env = { ...process.env, EAC_MOE_CUDA: library, EAC_MOE_BINARY: addon, FAKE: trouble };
  const args = ['--no-warnings', '-e', script];
  const { stdout, stderr } = spawnSync(process.execPath, args, { env, encoding: 'utf8' });
  expect(stderr).toBe('');
  return JSON.parse(stdout) as ReturnType<typeof load>;
}

const addon = join(dir, 'eac_moe.node'); // with no library beside it
const text = join(dir, 'text.so');
const fake = join(dir, 'fake.so');
beforeAll(() => {
  const { resolve } = jest.requireActual<{ resolve(directory: string): string }>('node-gyp-build');
  copyFileSync(process.env.EAC_MOE_BINARY ?? resolve(root), addon);
  writeFileSync(text, 'no library');
  const flags = ['-std=c++20', '-shared', '-fPIC', '-Wall', '-Wextra', '-Werror', '-I', join(root, 'native')];
  const source = join(root, 'test/native/cuda/unusable/library.cpp');
  const { stderr, status } = spawnSync(process.env.CXX ?? 'c++', [...flags, source, '-o', fake]);
  expect([String(stderr), status]).toEqual(['', 0]);
});

const missing = join(dir, 'missing.so');
test.each([
  ['a library that EAC_MOE_CUDA names is missing', missing, '', 'FILE_NOT_FOUND', missing],
  ['the library is none', text, '', 'DEVICE', 'the CUDA library does not open'],
  ['the library is of another version', fake, 'version', 'DEVICE', 'build it again (npm run build:cuda)'],
  ['the driver is too old', fake, 'driver', 'DEVICE', 'no GPU answers: CUDA driver version is insufficient'],
  ['the GPU is busy', fake, 'busy', 'DEVICE', 'cannot be opened: choosing the GPU: all devices are busy'],
  ['its memory is full', fake, 'memory', 'OUT_OF_MEMORY', 'creating a stream: out of memory'],
])("%s: 'cuda' says so, 'auto' warns once and takes the CPU", (_name, library, trouble, code, why) => {
  const message = expect.stringContaining(why) as string;
  const refused = load('cuda', library, trouble);
  expect(refused).toEqual({ loaded: Array(3).fill({ code, message }), warnings: [] });
  expect(JSON.stringify(refused)).toContain("use 'auto' or 'cpu'");
  expect(load('auto', library, trouble)).toEqual({
    loaded: Array(3).fill({ device: 'cpu' }),
    warnings: [{ code: 'EAC_MOE_CUDA', message }],
  });
});

test.each([
  ['without the library', '', '', 'there is no CUDA library at'],
  ['without a GPU', fake, 'none', 'there is no GPU: no CUDA device'],
])("a machine %s: 'cuda' says so, 'auto' takes the CPU without a word", (_name, library, trouble, why) => {
  const refused = { code: 'INVALID_ARGUMENT', message: expect.stringContaining(why) as string };
  expect(load('cuda', library, trouble)).toEqual({ loaded: Array(3).fill(refused), warnings: [] });
  expect(load('auto', library, trouble)).toEqual({ loaded: Array(3).fill({ device: 'cpu' }), warnings: [] });
});
