/** Finding the CUDA library, on any machine: each case in a process of its own, because it is looked for once. */
import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { scratch } from '../checkpoint/helpers';

const root = join(__dirname, '../..');
const bundled = join(root, 'models/trio-moe-9m');
const dir = scratch();

interface Loaded {
  code?: string;
  message?: string;
  device?: string;
}

/** What loading the bundled model on a device comes to, where EAC_MOE_CUDA names this file. */
function load(library: string, device: string): Loaded {
  const script = `
    const { MoeModel } = require(${JSON.stringify(join(root, 'dist'))});
    MoeModel.load(${JSON.stringify(bundled)}, { device: '${device}' }).then(
      (model) => model.forward([1, 2, 3]).then(() => console.log(JSON.stringify({ device: model.device }))),
      ({ code, message }) => console.log(JSON.stringify({ code, message })),
    );`;
  const env = { ...process.env, EAC_MOE_CUDA: library };
  const { stdout, stderr } = spawnSync(process.execPath, ['-e', script], { env, encoding: 'utf8' });
  expect(stderr).toBe('');
  return JSON.parse(stdout) as Loaded;
}

const other = join(dir, 'other.so');
beforeAll(() => writeFileSync(other, 'no library'));

test.each([
  ['that is missing', join(dir, 'missing.so'), 'there is no CUDA library at'],
  ['that is none', other, 'the CUDA library does not open'],
])("a library %s: 'cuda' says so, 'auto' takes the CPU", (_name, library, why) => {
  const refused = load(library, 'cuda');
  expect(refused).toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining(why) as string,
  });
  expect(refused.message).toContain(library);
  expect(refused.message).toContain("use 'auto' or 'cpu'");
  expect(load(library, 'auto')).toEqual({ device: 'cpu' });
});
