/** The README's example runs as it is printed, on the bundled model and with little calibration. */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import * as ts from 'typescript';

const root = join(__dirname, '..', '..');

/** The first TypeScript block of the README. */
function example(): string {
  const block = /^```ts\n([\s\S]*?)^```$/m.exec(readFileSync(join(root, 'README.md'), 'utf8'));
  if (!block) throw new Error('README.md has no TypeScript example');
  return block[1]!;
}

/** Replaces what must be there: a README that changes without this test is a failure, not a pass. */
function substitute(code: string, from: string, to: string): string {
  if (!code.includes(from)) throw new Error(`the README's example has no ${from}`);
  return code.replaceAll(from, to);
}

/** The body of an async function that does the same: ESM imports become requires. */
function compile(code: string): string {
  const options = { module: ts.ModuleKind.CommonJS, target: ts.ScriptTarget.ES2022, esModuleInterop: true };
  return ts.transpileModule(code, { compilerOptions: options }).outputText;
}

describe('README', () => {
  let dir: string;
  beforeAll(() => (dir = mkdtempSync(join(tmpdir(), 'eac-moe-readme-'))));
  afterAll(() => rmSync(dir, { recursive: true, force: true }));

  test('the example runs', async () => {
    let code = example();
    code = substitute(code, './Qwen1.5-MoE-A2.7B', join(root, 'models', 'trio-moe-9m'));
    code = substitute(code, './qwen-3bit', join(dir, '3bit'));
    code = substitute(code, './text.txt', join(root, 'scripts', 'data', 'prose.txt'));
    code = substitute(code, "calibration: 'self'", "calibration: 'self', samples: 8, seqLen: 64");
    const printed: unknown[][] = [];
    const output = { log: (...values: unknown[]) => void printed.push(values) };
    let generated = '';
    const program = { stdout: { write: (piece: string) => (generated += piece) } };
    const load = (name: string): unknown => (name === 'eac-moe' ? require('../../lib') : require(name));
    const parameters = ['require', 'exports', 'console', 'process'];

    const run = new Function(...parameters, `return (async () => {${compile(code)}\n})()`) as (
      ...args: unknown[]
    ) => Promise<void>;
    await run(load, {}, output, program);

    expect(generated.length).toBeGreaterThan(0);
    const lines = printed.map(([first]) => first);
    expect(lines).toContainEqual(expect.stringMatching(/^100 % /));
    expect(lines).toContainEqual(expect.stringMatching(/ bits a weight$/));
    const evaluation = lines.at(-1) as { perplexity: number; kl: number; prunedExperts: number };
    expect(evaluation.perplexity).toBeLessThan(150);
    expect(evaluation.kl).toBeGreaterThan(0);
    expect(evaluation.prunedExperts).toBeGreaterThan(0);
  });
});
