/** The compiled command line, run as users run it: output, exit codes, messages. */
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { scratch } from '../checkpoint/helpers';

const root = join(__dirname, '../..');
const cli = join(root, 'dist/cli/index.js');
const model = join(root, 'models/trio-moe-9m');
const dir = scratch();
const text = join(dir, 'text.txt');
const choices = join(dir, 'choices.jsonl');

beforeAll(() => {
  if (!existsSync(cli))
    throw new Error('dist/cli/index.js is missing: run `npm run build:ts` (npm test does)');
  writeFileSync(text, 'The ship sailed along the coast for three days, and 12 + 7 = 19.\n'.repeat(60));
  const row = { context: 'The ship sailed along the', choices: [' coast', ' of of of'], answer: 0 };
  writeFileSync(choices, `${JSON.stringify(row)}\n\n${JSON.stringify({ ...row, answer: 1 })}\n`);
});

function run(...args: string[]) {
  const { EAC_MOE_DEBUG: _, ...env } = process.env;
  const { status, stdout, stderr } = spawnSync(process.execPath, [cli, ...args], {
    encoding: 'utf8',
    cwd: dir,
    env,
  });
  return { status, stdout, stderr };
}

/** The one JSON document on stdout. */
function json(...args: string[]): Record<string, unknown> {
  const { status, stdout, stderr } = run(...args, '--json');
  if (status !== 0) throw new Error(stderr);
  return JSON.parse(stdout) as Record<string, unknown>;
}

describe('inspect', () => {
  test('--json', () => {
    expect(json('inspect', model)).toMatchObject({
      family: 'qwen2_moe',
      layers: 4,
      moeLayers: 4,
      experts: 16,
      topK: 4,
      sharedExperts: true,
      parameters: 8934656,
      dtype: 'bfloat16',
      sizes: [{ bits: 16, bytes: 17869312 }, { bits: 2 }, { bits: 2.5 }, { bits: 3 }, { bits: 4 }],
    });
  });

  test('for people', () => {
    const { status, stdout, stderr } = run('inspect', model);
    expect([status, stderr]).toEqual([0, '']);
    expect(stdout).toMatch(/family +qwen2_moe\n/);
    expect(stdout).toMatch(/2\.5 +2\.80 +2\.95 +5\.04 MB/);
  });
});

describe('eval', () => {
  test('--json gives what was asked for, and progress goes to stderr', () => {
    const { status, stdout, stderr } = run(
      'eval',
      model,
      '--text',
      text,
      '--seq-len',
      '64',
      '--max-tokens',
      '300',
      '--json',
    );
    expect(status).toBe(0);
    const result = JSON.parse(stdout) as Record<string, unknown>;
    expect(result).toEqual({
      perplexity: expect.any(Number) as number,
      tokens: 256,
      windows: 4,
      bytes: expect.any(Number) as number,
    });
    expect(stderr).toContain('100 %');
  });

  test('everything at once', () => {
    const flags = [
      '--text',
      text,
      '--seq-len',
      '64',
      '--choices',
      choices,
      '--reference',
      model,
      '--prune',
      '0.7',
      '--causal',
    ];
    const result = json('eval', model, ...flags);
    expect(result.choices).toMatchObject({ acc: expect.any(Number) as number, n: 2 });
    expect((result.choices as { accuracy: number }).accuracy).toBe(0.5);
    expect(result.kl).toBeGreaterThan(0);
    expect(result.prunedExperts).toBeGreaterThan(0);
    expect(result.expertShift).toMatchObject({
      changedAll: expect.any(Number) as number,
      layers: [{ layer: 0, changedAny: 0 }, {}, {}, {}],
    });
    expect(result.causal).toMatchObject({ perplexity: expect.any(Number) as number });
    const { status, stdout } = run('eval', model, ...flags);
    expect(status).toBe(0);
    for (const name of ['perplexity', 'KL divergence', 'expert shift', 'pruned', 'causal', 'choices']) {
      expect(stdout).toMatch(new RegExp(`^${name} `, 'm'));
    }
  });
});

describe('generate', () => {
  const flags = ['generate', model, '-p', 'The ship sailed', '-n', '6'];

  test('the text on stdout, figures on stderr', () => {
    const { status, stdout, stderr } = run(...flags);
    expect(status).toBe(0);
    const result = json(...flags);
    expect(stdout).toBe(`${result.text as string}\n`);
    expect(stderr).toContain('6 new tokens');
    expect(result).toMatchObject({
      reason: 'length',
      newTokens: 6,
      promptTokens: expect.any(Number) as number,
    });
    expect(result.ids).toHaveLength(6);
  });

  test('a seed repeats itself, pruning is reported', () => {
    const sampled = [
      ...flags,
      '--temperature',
      '1',
      '--top-k',
      '50',
      '--top-p',
      '0.9',
      '--seed',
      '3',
      '--prune',
      '0.3',
    ];
    const result = json(...sampled);
    expect(json(...sampled).ids).toEqual(result.ids);
    expect(result.pruning).toMatchObject({ alpha: 0.3, layers: [{ layer: 0, sequences: 1 }, {}, {}, {}] });
  });
});

describe('quantize', () => {
  test('writes a model that the other commands take', () => {
    const output = join(dir, 'rtn');
    const report = json(
      'quantize',
      model,
      '-o',
      output,
      '--method',
      'rtn',
      '--router',
      'none',
      '--bits',
      '4',
      '--group-size',
      '64',
    );
    expect(report).toMatchObject({ averageBits: 4, calibration: { tokens: 0 }, layers: [{}, {}, {}, {}] });
    expect(json('inspect', output)).toMatchObject({ quantization: { averageBits: 4, matrices: { 4: 220 } } });
    const { perplexity, kl } = json('eval', output, '--text', text, '--seq-len', '64', '--reference', model);
    expect(perplexity).toBeGreaterThan(1);
    expect(kl).toBeGreaterThan(0);
    expect(kl).toBeLessThan(0.1);
    expect(run('quantize', output, '-o', join(dir, 'twice'))).toMatchObject({
      status: 1,
      stderr: expect.stringContaining('already quantized') as string,
    });
    expect(existsSync(join(dir, 'twice'))).toBe(false);
  });

  test('all of its switches reach the library', () => {
    const lists = join(dir, 'texts.json');
    writeFileSync(lists, JSON.stringify([readFileSync(text, 'utf8')]));
    const { options, calibration } = json(
      ...[
        'quantize',
        model,
        '-o',
        join(dir, 'gptq'),
        '--bits',
        '2.5',
        '--attention-bits',
        '3',
        '--shared-bits',
        'experts',
      ],
      ...[
        '--calibration',
        text,
        '--calibration',
        lists,
        '--samples',
        '3',
        '--seq-len',
        '64',
        '--router-k',
        '6',
        '--ridge',
        '0.01',
      ],
      ...[
        '--damping',
        '0.02',
        '--no-act-order',
        '--no-two-stream',
        '--symmetric',
        '--seed',
        '5',
        '--threads',
        '2',
      ],
    );
    expect(calibration).toEqual({ sequences: 3, seqLen: 64, tokens: 192 });
    expect(options).toMatchObject({ actOrder: false, twoStreamTargets: false, damping: 0.02, seed: 5 });
    const layer = 'model.layers.0';
    expect((options as { plan: object }).plan).toMatchObject({
      [`${layer}.self_attn.q_proj.weight`]: { bits: 3, groupSize: 128, symmetric: true },
      [`${layer}.mlp.shared_expert.up_proj.weight`]: { bits: 3, symmetric: true },
      'model.layers.3.mlp.experts.0.up_proj.weight': { bits: 2, symmetric: true },
    });
    expect(options).toMatchObject({ router: { loss: 'topk-mse', k: 6, ridge: 0.01 } });
  });
});

describe('export', () => {
  test('a file for llama.cpp, with what it cost', () => {
    const output = join(dir, 'model.gguf');
    const { status, stdout, stderr } = run('export', model, '--format', 'gguf', '-o', output);
    expect([status, stdout.split('\n')[0]]).toEqual([0, `written  ${output}`]);
    expect(stdout).toMatch(/\nBF16 +42 +19\.92 MB +exact\n/);
    expect(stderr).toContain('100 % done');
    expect(readFileSync(output).subarray(0, 4).toString()).toBe('GGUF');
    const again = run('export', model, '--format', 'gguf', '-o', output);
    expect([again.status, again.stdout]).toEqual([1, '']);
    expect(again.stderr).toContain(`${output}: already exists`);
  });

  test('--json; options of another format are wrong usage', () => {
    const source = join(dir, 'to-export');
    json(
      'quantize',
      model,
      '-o',
      source,
      '--method',
      'rtn',
      '--router',
      'none',
      '--bits',
      '4',
      '--symmetric',
    );
    const output = join(dir, 'exported');
    const format = ['--format', 'compressed-tensors', '-o', output];
    expect(run('export', source, ...format, '--gptq-version', '1')).toMatchObject({ status: 2, stdout: '' });
    expect(json('export', source, ...format)).toMatchObject({
      format: 'compressed-tensors',
      output,
      notes: [],
    });
    expect(readdirSync(output)).toContain('config.json');
  });
});

describe('wrong usage exits 2 and says what is allowed', () => {
  test.each([
    [['frobnicate'], "unknown command 'frobnicate'"],
    [['inspect'], "missing required argument 'model'"],
    [['inspect', 'a', 'b'], 'too many arguments'],
    [['inspect', model, '--frob'], "unknown option '--frob'"],
    [['quantize', model], '--output'],
    [['quantize', model, '-o', 'x', '--bits', '5'], '2, 2.5, 3, 4'],
    [['quantize', model, '-o', 'x', '--group-size', '0'], 'multiple of 32'],
    [['quantize', model, '-o', 'x', '--group-size', '48'], 'multiple of 32'],
    [['quantize', model, '-o', 'x', '--attention-bits', '8'], '2, 3, 4, 16'],
    [['quantize', model, '-o', 'x', '--method', 'awq'], 'gptq, rtn'],
    [['quantize', model, '-o', 'x', '--router', 'adam'], 'topk-mse, mse, none'],
    [['quantize', model, '-o', 'x', '--samples', '1.5'], 'positive integer'],
    [['quantize', model, '-o', 'x', '--seed', ''], 'integer'],
    [['quantize', model, '-o', 'x', '--router', 'mse', '--router-k', '4'], '--router-k'],
    [['quantize', model, '-o', 'x', '--calibration', 'self', '--calibration', 'y'], "'self'"],
    [['eval', model], '--text'],
    [['eval', model, '--choices', 'x', '--reference', model], '--reference needs --text'],
    [['eval', model, '--text', 'x', '--prune', '0'], '(0, 1]'],
    [['eval', model, '--text', 'x', '--prune', '1.01'], '(0, 1]'],
    [['eval', model, '--text', 'x', '--seq-len', '1'], '2 or more'],
    [['generate', model], '--prompt'],
    [['generate', model, '-p', 'x', '-n', '0'], 'positive integer'],
    [['generate', model, '-p', 'x', '--temperature', 'hot'], '0 or more'],
    [['generate', model, '-p', 'x', '--top-p', '2'], '(0, 1]'],
    [['generate', model, '-p', 'x', '--device', 'tpu'], 'auto, cpu, cuda'],
  ])('%j', (args, message) => {
    const { status, stdout, stderr } = run(...args);
    expect(stderr).toMatch(/^eac-moe: /);
    expect(stderr).toContain(message);
    expect([status, stdout, readdirSync(dir).includes('x')]).toEqual([2, '', false]);
  });
});

describe('failure exits 1 with one line that names the culprit', () => {
  const file = (name: string, content: string) => {
    writeFileSync(join(dir, name), content);
    return join(dir, name);
  };
  test.each([
    [() => ['inspect', join(dir, 'nowhere')], 'nowhere: no such directory'],
    [() => ['inspect', text], 'found a file'],
    [() => ['eval', model, '--text', 'nowhere.txt'], 'nowhere.txt: no such file'],
    [() => ['eval', join(dir, 'nowhere'), '--text', text], 'nowhere: no such directory'],
    [() => ['quantize', model, '-o', 'x', '--calibration', 'nowhere.txt'], 'nowhere.txt: no such file'],
    [
      () => ['quantize', model, '-o', 'x', '--calibration', file('empty.txt', ' \n')],
      'empty.txt: holds no text',
    ],
    [
      () => ['quantize', model, '-o', 'x', '--calibration', file('bad.json', '[1, 2]')],
      'bad.json: expected a JSON list of texts',
    ],
    [() => ['quantize', model, '-o', 'x', '--calibration', file('none.json', '[]')], 'calibration'],
  ])('case %#', (args, message) => {
    const { status, stdout, stderr } = run(...args());
    const errors = stderr.split('\n').filter((line) => !/^ *\d+ % /.test(line));
    expect(errors).toEqual([expect.stringMatching(/^eac-moe: /), '']);
    expect(errors[0]).toContain(message);
    expect([status, stdout, existsSync(join(dir, 'x'))]).toEqual([1, '', false]);
  });

  test('rows of choices are counted', () => {
    const broken = file('broken.jsonl', '{"context": "a", "choices": ["b", "c"], "answer": 0}\n{"context"\n');
    expect(run('eval', model, '--choices', broken)).toMatchObject({
      status: 2,
      stderr: `eac-moe: ${broken}, line 2: is not valid JSON\n`,
    });
  });

  test('EAC_MOE_DEBUG=1 shows where', () => {
    const env = { ...process.env, EAC_MOE_DEBUG: '1' };
    const { status, stderr } = spawnSync(process.execPath, [cli, 'inspect', 'nowhere'], {
      encoding: 'utf8',
      cwd: dir,
      env,
    });
    expect(status).toBe(1);
    expect(stderr).toMatch(/nowhere: no such directory\n +at /);
  });
});

test('--help and --version exit 0', () => {
  const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
  expect(run('--version')).toEqual({ status: 0, stdout: `${version}\n`, stderr: '' });
  for (const command of ['inspect', 'quantize', 'eval', 'generate', 'bench']) {
    const { status, stdout } = run(command, '--help');
    expect(status).toBe(0);
    expect(stdout).toContain('--json');
  }
});

test('Ctrl-C ends a long command with 130', async () => {
  const long = join(dir, 'long.txt');
  writeFileSync(long, readFileSync(text, 'utf8').repeat(300));
  const child = spawn(process.execPath, [cli, 'eval', model, '--text', long, '--json'], { cwd: dir });
  let [stdout, stderr] = ['', ''];
  child.stdout.on('data', (data: Buffer) => (stdout += data.toString()));
  child.stderr.on('data', (data: Buffer) => {
    if (stderr === '') child.kill('SIGINT');
    stderr += data.toString();
  });
  const code = await new Promise((done) => child.on('close', done));
  expect([code, stdout]).toEqual([130, '']);
  expect(stderr).toMatch(/eac-moe: interrupted\n$/);
});
