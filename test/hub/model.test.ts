/** `hf:` names wherever a model is taken: the library and the compiled command line, with the bundled model on a hub of this machine. */
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { downloadModel, inspectModel, MoeModel, quantizeMoE } from '../../lib';
import { hubSettings } from '../../lib/hub/settings';
import { expectError, expectRejection, scratch } from '../checkpoint/helpers';
import { TestHub } from './server';

const root = join(__dirname, '../..');
const cli = join(root, 'dist/cli/index.js');
const bundled = join(root, 'models/trio-moe-9m');
const dir = scratch();
const hub = new TestHub();
const NAME = 'hf:test/trio@main';
const WEIGHTS = /\/lfs\//;
const prompt = 'The ship sailed along the';

const VARIABLES = [
  'HF_ENDPOINT', 'HF_HOME', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE', 'XDG_CACHE_HOME', 'HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN',
  'HF_TOKEN_PATH', 'HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE', 'HF_HUB_DOWNLOAD_TIMEOUT', 'EAC_MOE_DEBUG',
]; // prettier-ignore
const before = Object.fromEntries(VARIABLES.map((name) => [name, process.env[name]]));
let homes = 0;

beforeAll(async () => {
  if (!existsSync(cli))
    throw new Error('dist/cli/index.js is missing: run `npm run build:ts` (npm test does)');
  await hub.start();
  hub.add(
    'test/trio',
    Object.fromEntries(readdirSync(bundled).map((name) => [name, readFileSync(join(bundled, name))])),
  );
});
afterAll(async () => {
  await hub.stop();
  for (const name of VARIABLES) if (before[name] !== undefined) process.env[name] = before[name];
});
beforeEach(() => {
  for (const name of VARIABLES) delete process.env[name];
  process.env.HF_ENDPOINT = `${hub.endpoint}/`;
  process.env.HF_HOME = join(dir, `home-${homes++}`);
  hub.requests.length = hub.faults.length = 0;
});

function run(...args: string[]): Promise<{ status: number | null; stdout: string; stderr: string }> {
  return new Promise((done, fail) => {
    const child = spawn(process.execPath, [cli, ...args], { cwd: dir, env: process.env });
    let [stdout, stderr] = ['', ''];
    child.stdout.on('data', (text: Buffer) => (stdout += text.toString()));
    child.stderr.on('data', (text: Buffer) => (stderr += text.toString()));
    child.on('error', fail);
    child.on('close', (status) => done({ status, stdout, stderr }));
  });
}

describe('the library', () => {
  test('loads a model, and reports the download', async () => {
    const seen: { stage: string; bytes: number; totalBytes: number }[] = [];
    using model = await MoeModel.load(NAME, { onProgress: (progress) => seen.push(progress) });
    const size = readFileSync(join(bundled, 'model.safetensors')).byteLength;
    expect(seen.at(-1)).toMatchObject({ stage: 'download', bytes: size, totalBytes: size, fraction: 1 });
    expect(model.path).toBe(await downloadModel(NAME));
    expect(model.path.startsWith(join(process.env.HF_HOME!, 'hub', 'models--test--trio', 'snapshots'))).toBe(
      true,
    );
    using local = await MoeModel.load(bundled);
    const ids = local.tokenizer.encode(prompt);
    expect(model.tokenizer.encode(prompt)).toEqual(ids);
    expect((await model.forward(ids)).logits).toEqual((await local.forward(ids)).logits);
  });

  test('inspects without downloading weights, and by the same figures', async () => {
    const { path: _, ...info } = await inspectModel(bundled);
    const messages: string[] = [];
    const onProgress = ({ message }: { message: string }) => messages.push(message);
    expect(await inspectModel(NAME, { onProgress })).toEqual({ path: NAME, ...info });
    expect(messages.at(-1)).toBe('reading headers of test/trio: 1 of 1 files');
    // One request brings 256 KiB; the header is a part of that.
    expect(hub.sent(WEIGHTS)).toBeLessThan(2 ** 20);
    hub.faults.push({ url: WEIGHTS, cutAfter: 100 }, { url: WEIGHTS, ignoreRange: true });
    expect(await inspectModel(NAME)).toEqual({ path: NAME, ...info });
    await downloadModel(NAME);
    hub.requests.length = 0;
    expect(await inspectModel(NAME)).toEqual({ path: NAME, ...info });
    expect(hub.sent(WEIGHTS)).toBe(0);
  });

  test('inspects what has a header longer than the first request brings', async () => {
    const header: Record<string, unknown> = { __metadata__: { note: 'x'.repeat(300_000) } };
    const bytes = Buffer.from(JSON.stringify(header));
    const length = Buffer.alloc(8);
    length.writeBigUInt64LE(BigInt(bytes.byteLength));
    hub.add('test/empty', {
      'config.json': readFileSync(join(bundled, 'config.json')),
      'model.safetensors': Buffer.concat([length, bytes]),
    });
    // The header arrived whole: what it lacks is tensors.
    await expectRejection(inspectModel('hf:test/empty'), 'INVALID_TENSOR', 'missing');
  });

  test('quantizes, with the download as a stage of its own', async () => {
    const stages = new Set<string>();
    const options = {
      method: 'rtn',
      router: false,
      onProgress: (p: { stage: string }) => stages.add(p.stage),
    } as const;
    const { model } = await quantizeMoE(NAME, { output: join(dir, 'from-hub'), ...options });
    model.dispose();
    expect([...stages][0]).toBe('download');
    await quantizeMoE(bundled, { output: join(dir, 'from-disk'), method: 'rtn', router: false }).then((r) =>
      r.model.dispose(),
    );
    const read = (output: string, name: string) => readFileSync(join(dir, output, name));
    for (const name of readdirSync(join(dir, 'from-disk')).filter((file) => file !== 'eac_moe.json'))
      expect(read('from-hub', name).equals(read('from-disk', name))).toBe(true);
    const report = (output: string) =>
      JSON.parse(read(output, 'eac_moe.json').toString()) as { source: object };
    const expected = report('from-disk');
    expect(report('from-hub')).toEqual({ ...expected, source: { ...expected.source, name: NAME } });
  });
});

describe('the command line', () => {
  test('quantize, then export what was put on the hub', async () => {
    const output = join(dir, 'quantized');
    const quantized = await run('quantize', NAME, '-o', output, '--method', 'rtn', '--router', 'none');
    expect([quantized.status, quantized.stdout]).toEqual([0, expect.stringContaining('written')]);
    hub.add(
      'test/small',
      Object.fromEntries(readdirSync(output).map((n) => [n, readFileSync(join(output, n))])),
    );
    const exported = join(dir, 'exported');
    const { status } = await run('export', 'hf:test/small', '--format', 'gptq', '-o', exported);
    expect([status, existsSync(join(exported, 'config.json'))]).toEqual([0, true]);
    const generate = await run('generate', 'hf:test/small', '-p', prompt, '-n', '4');
    expect(generate.stdout).toBe((await run('generate', output, '-p', prompt, '-n', '4')).stdout);
  });

  test('inspect', async () => {
    const { status, stdout, stderr } = await run('inspect', NAME);
    expect([status, stderr]).toEqual([0, expect.stringContaining('test/trio: configuration')]);
    expect(stdout).toMatch(/family +qwen2_moe\n/);
  });

  test('generate after a broken connection, with progress; then from the cache, offline', async () => {
    hub.faults.push({ url: WEIGHTS, cutAfter: 5_000_000 });
    const flags = ['-p', prompt, '-n', '8'];
    const local = await run('generate', bundled, ...flags);
    const first = await run('generate', NAME, ...flags);
    expect([first.status, first.stdout]).toEqual([0, local.stdout]);
    expect(first.stderr).toMatch(/100 % downloading test\/trio: 18 of 18 MB/);
    expect(hub.requests.filter(({ url }) => WEIGHTS.test(url)).length).toBe(2);
    process.env.HF_HUB_OFFLINE = '1';
    hub.requests.length = 0;
    const second = await run('generate', NAME, ...flags);
    expect([second.status, second.stdout, hub.requests]).toEqual([0, local.stdout, []]);
    delete process.env.HF_HUB_OFFLINE;
    process.env.HF_ENDPOINT = 'http://127.0.0.1:2';
    const third = await run('generate', NAME, ...flags);
    expect([third.status, third.stdout]).toEqual([0, local.stdout]);
    expect(third.stderr).toMatch(/EAC_MOE_HUB.*Using the cached/);
  });

  test('eval against a reference of the hub', async () => {
    const text = join(root, 'scripts/data/prose.txt');
    const flags = ['--text', text, '--seq-len', '64', '--max-tokens', '128', '--json'];
    const { status, stdout } = await run('eval', bundled, '--reference', NAME, ...flags);
    expect([status, (JSON.parse(stdout) as { kl: number }).kl]).toEqual([0, 0]);
  });

  test('bench --model', async () => {
    const flags = [
      '--kernel',
      'pesf',
      '--shape',
      '64,32,4,2',
      '--tokens',
      '32',
      '--bits',
      '4',
      '--threads',
      '1',
    ];
    const text = join(root, 'scripts/data/prose.txt');
    const { status, stderr } = await run(
      'bench',
      ...flags,
      '--seconds',
      '0.01',
      '--cycle',
      '1',
      '--model',
      NAME,
      '--text',
      text,
    );
    expect([status, hub.sent(WEIGHTS) > 0 || stderr]).toEqual([0, true]);
  });

  test('a model that does not exist', async () => {
    const { status, stdout, stderr } = await run('generate', 'hf:test/none', '-p', prompt);
    expect([status, stdout]).toEqual([1, '']);
    expect(stderr).toMatch(/^eac-moe: hf:test\/none@main: no such model at .*HF_TOKEN/);
    expect(stderr.trimEnd().split('\n')).toHaveLength(1);
  });

  test('a name of another form', async () => {
    const { status, stderr } = await run('inspect', 'hf:trio');
    expect([status, stderr]).toEqual([2, expect.stringContaining('hf:<owner>/<name>')]);
  });

  test('two processes at once download the weights once', async () => {
    hub.faults.push({ url: WEIGHTS, slow: 1 });
    const flags = ['generate', NAME, '-p', prompt, '-n', '2'];
    const both = await Promise.all([run(...flags), run(...flags)]);
    expect(both.map(({ status }) => status)).toEqual([0, 0]);
    expect(hub.requests.filter(({ url }) => WEIGHTS.test(url)).length).toBe(1);
  });

  test('killed in the middle: the next run fetches the rest', async () => {
    hub.faults.push({ url: WEIGHTS, stallAfter: 9_000_000 });
    const child = spawn(process.execPath, [cli, 'generate', NAME, '-p', prompt], {
      env: process.env,
      stdio: 'ignore',
    });
    const blobs = join(process.env.HF_HOME!, 'hub/models--test--trio/blobs');
    const partial = () =>
      existsSync(blobs) && readdirSync(blobs).find((name) => name.endsWith('.incomplete'));
    const kept = () => readFileSync(join(blobs, partial() as string)).byteLength;
    while (hub.sent(WEIGHTS) < 9_000_000 || !partial() || kept() < 8_000_000)
      await new Promise((r) => setTimeout(r, 20));
    child.kill('SIGKILL');
    await new Promise((done) => child.on('close', done));
    const length = kept();
    hub.requests.length = 0;
    const { status } = await run('generate', NAME, '-p', prompt, '-n', '2');
    const size = readFileSync(join(bundled, 'model.safetensors')).byteLength;
    expect([status, hub.sent(WEIGHTS)]).toEqual([0, size - length]);
  });
});

describe('the environment', () => {
  test('where the cache is', () => {
    expect(hubSettings().cache).toBe(join(process.env.HF_HOME!, 'hub'));
    process.env.HF_HUB_CACHE = '/data/hub';
    expect(hubSettings().cache).toBe('/data/hub');
    delete process.env.HF_HUB_CACHE;
    delete process.env.HF_HOME;
    process.env.XDG_CACHE_HOME = '/data/cache';
    expect(hubSettings().cache).toBe('/data/cache/huggingface/hub');
  });

  test('the token: HF_TOKEN, then HUGGING_FACE_HUB_TOKEN, then the file of `hf auth login`', () => {
    const file = join(process.env.HF_HOME!, 'token');
    expect(hubSettings().token).toBeUndefined();
    mkdirSync(process.env.HF_HOME!, { recursive: true });
    writeFileSync(file, 'hf_file\n');
    expect(hubSettings().token).toEqual({ value: 'hf_file', from: file });
    process.env.HUGGING_FACE_HUB_TOKEN = 'hf_old';
    expect(hubSettings().token).toEqual({ value: 'hf_old', from: 'HUGGING_FACE_HUB_TOKEN' });
    process.env.HF_TOKEN = 'hf_new';
    expect(hubSettings().token).toEqual({ value: 'hf_new', from: 'HF_TOKEN' });
    process.env.HF_TOKEN = 'ü\nx';
    expectError(() => hubSettings(), 'INVALID_ARGUMENT', 'HF_TOKEN');
  });

  test('the endpoint, the timeout, offline mode', () => {
    expect(hubSettings()).toMatchObject({ endpoint: hub.endpoint, timeout: 10_000, offline: undefined });
    process.env.HF_HUB_DOWNLOAD_TIMEOUT = '30';
    process.env.TRANSFORMERS_OFFLINE = 'yes';
    expect(hubSettings()).toMatchObject({ timeout: 30_000, offline: 'TRANSFORMERS_OFFLINE' });
    process.env.HF_HUB_OFFLINE = '0';
    expect(hubSettings().offline).toBe('TRANSFORMERS_OFFLINE');
    process.env.HF_ENDPOINT = 'hub.example';
    expectError(() => hubSettings(), 'INVALID_ARGUMENT', 'HF_ENDPOINT', 'hub.example');
  });
});

const python = process.env.EAC_MOE_PYTHON ?? 'python3';
const hasClient = spawnSync(python, ['-c', 'import huggingface_hub']).status === 0;
if (!hasClient) console.warn(`SKIPPED: ${python} has no huggingface_hub (EAC_MOE_PYTHON names another)`);

(hasClient ? describe : describe.skip)("the cache is that of Python's huggingface_hub", () => {
  const snapshot = (...flags: string[]) => {
    const call = `print(snapshot_download('test/trio', ${flags.join(', ')}))`;
    const child = spawn(python, ['-c', `from huggingface_hub import snapshot_download; ${call}`], {
      env: process.env,
    });
    let [stdout, stderr] = ['', ''];
    child.stdout.on('data', (text: Buffer) => (stdout += text.toString()));
    child.stderr.on('data', (text: Buffer) => (stderr += text.toString()));
    return new Promise<string>((done, fail) =>
      child.on('close', (status) => (status === 0 ? done(stdout.trim()) : fail(new Error(stderr)))),
    );
  };

  test('it finds what was downloaded here', async () => {
    const directory = await downloadModel(NAME);
    expect(await snapshot('local_files_only=True')).toBe(directory);
    hub.requests.length = 0;
    expect(await snapshot()).toBe(directory);
    expect(hub.sent(/\/lfs\/|\/resolve\//)).toBe(0);
  });

  test('what it downloaded is found here', async () => {
    const directory = await snapshot();
    process.env.HF_HUB_OFFLINE = '1';
    expect(await downloadModel(NAME)).toBe(directory);
    delete process.env.HF_HUB_OFFLINE;
    hub.requests.length = 0;
    expect(await downloadModel(NAME)).toBe(directory);
    expect(hub.sent()).toBe(0);
  });
});
