/** Runs that are killed or aborted, at any point, and started again: the result is that of a run that was left alone. */
import { spawn } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { openSafetensors } from '../../lib/checkpoint/safetensors';
import { MoeModel } from '../../lib/model/model';
import { quantizeCheckpoint } from '../../lib/quantize';
import type { Progress, QuantizeOptions } from '../../lib/quantize/options';
import { expectRejection, scratch } from '../checkpoint/helpers';
import { TINY_CONFIG, writeSynthetic } from '../synthetic';
import { FEW, hashes, randomIds, TRIO } from './helpers';

const dir = scratch();
const PARTIAL = 'eac_moe.partial.json';

/** Runs a child until a step of which `when` is true, and `wait` milliseconds longer; then kills it. True if that was before its end. */
async function runAndKill(
  options: QuantizeOptions,
  when: (p: Progress) => boolean,
  wait: number,
): Promise<boolean> {
  const argument = JSON.stringify({ source: TRIO, options });
  const child = spawn(
    process.execPath,
    ['-r', 'ts-node/register/transpile-only', join(__dirname, 'child.ts'), argument],
    { stdio: ['ignore', 'pipe', 'inherit'] },
  );
  const ended = new Promise<NodeJS.Signals | null>((done) => child.on('close', (_, signal) => done(signal)));
  let armed = false;
  createInterface({ input: child.stdout }).on('line', (line) => {
    if (armed || !when(JSON.parse(line) as Progress)) return;
    armed = true;
    setTimeout(() => child.kill('SIGKILL'), wait);
  });
  const signal = await ended;
  expect(armed).toBe(true);
  return signal === 'SIGKILL';
}

const at = (stage: Progress['stage'], message: string, layer?: number) => (p: Progress) =>
  p.stage === stage && p.layer === layer && p.message.includes(message);

describe('SIGKILL', () => {
  const options = { ...FEW, output: join(dir, 'killed') };
  let reference: Record<string, string>;
  beforeAll(async () => {
    const output = join(dir, 'reference');
    await quantizeCheckpoint(TRIO, { ...FEW, output });
    reference = hashes(output);
  });

  test('at every stage of one run, then started again', async () => {
    const { output } = options;
    const places: [(p: Progress) => boolean, number, layersDone: number][] = [
      [at('sample', 'sampling'), 5, 0],
      [at('calibrate', 'attention', 0), 20, 0],
      [at('calibrate', 'router', 1), 3, 1],
      [at('calibrate', 'experts (7 of 16)', 2), 0, 2],
      [at('calibrate', 'forward', 3), 0, 3],
      [at('write', 'finishing'), 0, 4],
    ];
    for (const [when, wait, done] of places) {
      expect(await runAndKill(options, when, wait)).toBe(true);
      // What is there is whole, and no model yet.
      const names = readdirSync(output);
      expect(names).not.toContain('config.json');
      for (const name of names.filter((n) => /^model-.*\.safetensors$/.test(n)))
        openSafetensors(join(output, name)).dispose();
      const { layers } = JSON.parse(readFileSync(join(output, PARTIAL), 'utf8')) as { layers: unknown[] };
      // The process may get a little further before the signal arrives.
      expect([done, done + 1]).toContain(layers.length);
      await expectRejection(MoeModel.load(output), 'FILE_NOT_FOUND', 'config.json');
    }
    const partial = readFileSync(join(output, PARTIAL));
    writeFileSync(join(output, '.model-00002-of-00005.safetensors.tmp-1-0'), 'half a file');
    await quantizeCheckpoint(TRIO, options);
    expect(hashes(output)).toEqual(reference);

    // Between the last file's writing and the removal of the partial ones.
    writeFileSync(join(output, PARTIAL), partial);
    await quantizeCheckpoint(TRIO, options);
    expect(hashes(output)).toEqual(reference);
  });

  test('after a shard was written, before that was noted', async () => {
    const output = join(dir, 'unnoted');
    expect(await runAndKill({ ...options, output }, at('calibrate', 'experts', 2), 0)).toBe(true);
    const path = join(output, PARTIAL);
    const partial = JSON.parse(readFileSync(path, 'utf8')) as { layers: unknown[] };
    writeFileSync(path, JSON.stringify({ ...partial, layers: partial.layers.slice(0, 1) }));
    await quantizeCheckpoint(TRIO, { ...options, output });
    expect(hashes(output)).toEqual(reference);
  });
});

describe('AbortSignal and other options', () => {
  const source = join(dir, 'tiny');
  const calibration = randomIds(TINY_CONFIG.vocab_size);
  let runs = 0;
  beforeAll(() => writeSynthetic(source, TINY_CONFIG));

  const quantize = (output: string, options: Partial<QuantizeOptions> = {}) =>
    quantizeCheckpoint(source, { ...FEW, calibration, ...options, output });

  /** Aborts at a step; returns the directory. */
  async function aborted(options: Partial<QuantizeOptions>, when: (p: Progress) => boolean): Promise<string> {
    const output = join(dir, `aborted-${runs++}`);
    const controller = new AbortController();
    const onProgress = (p: Progress) => void (when(p) && controller.abort());
    await expectRejection(
      quantize(output, { ...options, onProgress, signal: controller.signal }),
      'ABORTED',
      'aborted',
    );
    return output;
  }

  async function uninterrupted(options: Partial<QuantizeOptions> = {}): Promise<Record<string, string>> {
    const output = join(dir, `whole-${runs++}`);
    await quantize(output, options);
    return hashes(output);
  }

  test.each<[string, Partial<QuantizeOptions>, (p: Progress) => boolean]>([
    ['while sampling', { calibration: 'self' }, at('sample', 'sampling')],
    ['in the attention of layer 0', {}, at('calibrate', 'attention', 0)],
    ['in the experts of layer 1', {}, at('calibrate', 'experts (3', 1)],
    ['while rounding to nearest', { method: 'rtn' }, at('calibrate', 'experts (3', 1)],
    ['while reading back', {}, at('calibrate', 'experts (3', 1)],
  ])('aborted %s, then started again', async (title, options, when) => {
    const output = await aborted(options, when);
    expect(readdirSync(output)).not.toContain('config.json');
    if (title === 'while reading back') {
      const controller = new AbortController();
      const onProgress = (p: Progress) => void (at('calibrate', 'reading', 0)(p) && controller.abort());
      await expectRejection(quantize(output, { onProgress, signal: controller.signal }), 'ABORTED');
    }
    await quantize(output, options);
    expect(hashes(output)).toEqual(await uninterrupted(options));
  });

  test('aborted without calibration data', async () => {
    const options = { method: 'rtn', router: false } as const;
    const controller = new AbortController();
    const output = join(dir, 'rtn');
    const run = quantize(output, {
      ...options,
      signal: controller.signal,
      onProgress: (p) => void (p.stage === 'calibrate' && controller.abort()),
    });
    await expectRejection(run, 'ABORTED');
    await quantize(output, options);
    expect(hashes(output)).toEqual(await uninterrupted(options));
  });

  test('aborted before it began', async () => {
    const output = join(dir, 'never');
    await expectRejection(quantize(output, { signal: AbortSignal.abort() }), 'ABORTED');
    expect(existsSync(output)).toBe(false);
  });

  test('aborted while the result is loaded', async () => {
    const output = join(dir, 'whole');
    await quantize(output);
    await expectRejection(MoeModel.load(output, { signal: AbortSignal.abort() }), 'ABORTED');
  });

  test.each<[string, Partial<QuantizeOptions>]>([
    ['plan of bits', { bits: 2 }],
    ['seed', { seed: 1 }],
    ['samples', { samples: 3 }],
    ['actOrder', { actOrder: false }],
    ['router', { router: false }],
    ['damping', { damping: 0.02 }],
    ['calibration', { calibration: randomIds(TINY_CONFIG.vocab_size, 4, 32) }],
  ])('another %s does not continue', async (name, options) => {
    const output = await aborted({}, at('calibrate', 'experts (3', 1));
    const before = hashes(output);
    await expectRejection(quantize(output, options), 'OUTPUT', output, `another ${name}`, 'resume: false');
    expect(hashes(output)).toEqual(before);
    await quantize(output, { ...options, resume: false });
    expect(hashes(output)).toEqual(await uninterrupted(options));
  });

  test('another source does not continue', async () => {
    const output = await aborted({}, at('calibrate', 'experts (3', 1));
    const other = join(dir, 'other');
    await writeSynthetic(other, { ...TINY_CONFIG, rope_theta: 5000 });
    const run = quantizeCheckpoint(other, { ...FEW, calibration, output });
    await expectRejection(run, 'OUTPUT', output, 'another source');
    // The same headers, one weight changed.
    await writeSynthetic(other, TINY_CONFIG, {
      edit: ({ name }, values) => {
        if (name === 'model.layers.0.mlp.experts.1.up_proj.weight') values[9]! ^= 1;
      },
    });
    const again = quantizeCheckpoint(other, { ...FEW, calibration, output });
    await expectRejection(again, 'OUTPUT', output, 'another source');
  });

  test('resume: false starts over', async () => {
    const output = await aborted({}, at('calibrate', 'experts (3', 1));
    const steps: Progress[] = [];
    await quantize(output, { resume: false, onProgress: (p) => void steps.push(p) });
    expect(steps.some((p) => p.message.includes('reading back'))).toBe(false);
    expect(hashes(output)).toEqual(await uninterrupted());
  });

  test('a lost shard is named', async () => {
    const output = await aborted({}, at('calibrate', 'experts (3', 1));
    const shard = join(output, 'model-00002-of-00003.safetensors');
    rmSync(shard);
    await expectRejection(quantize(output), 'FILE_NOT_FOUND', shard);
  });
});
