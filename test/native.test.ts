import * as fs from 'node:fs';
import * as os from 'node:os';
import * as path from 'node:path';
import * as ts from 'typescript';
import { EacMoeError } from '../lib/errors';
import { native, withSignal } from '../lib/native';

const api = native();

/** Member names of each interface in types/native.d.ts. */
function declared(): Map<string, string[]> {
  const file = path.join(__dirname, '../types/native.d.ts');
  const source = ts.createSourceFile(file, fs.readFileSync(file, 'utf8'), ts.ScriptTarget.ES2022, true);
  const interfaces = source.statements.filter(ts.isInterfaceDeclaration);
  return new Map(
    interfaces.map((node) => [
      node.name.text,
      node.members.map((member) => member.name!.getText(source)).sort(),
    ]),
  );
}

function capture(run: () => unknown): unknown {
  try {
    run();
  } catch (error) {
    return error;
  }
  return undefined;
}

describe('the declarations', () => {
  const handles = ['Tensor', 'QuantMatrix', 'MappedFile', 'HessianFactor', 'KvCache', 'Program', 'Frame'];
  const exported = api as unknown as Record<string, { prototype: object }>;

  test('name the functions of the addon', () => {
    const functions = Object.keys(exported).filter((name) => !handles.includes(name));
    expect(functions.sort()).toEqual(declared().get('NativeBinding'));
  });

  test.each(handles)('name the members of %s', (name) => {
    const members = Object.getOwnPropertyNames(exported[name]!.prototype).filter(
      (member) => member !== 'constructor',
    );
    expect(members.sort()).toEqual(declared().get(name));
  });
});

describe('native errors are EacMoeError', () => {
  const disposed = api.zeros('f32', [2, 2]);
  disposed.dispose();

  test.each([
    ['from a function', () => api.zeros('f32', [-1]), 'INVALID_ARGUMENT'],
    ['from a method', () => disposed.toArray(), 'DISPOSED'],
    ['from a getter', () => disposed.shape, 'DISPOSED'],
    ['from a missing file', () => api.mapFile('/nowhere/at/all'), 'FILE_NOT_FOUND'],
  ])('%s', (_name, run, code) => {
    const error = capture(run);
    expect(error).toBeInstanceOf(EacMoeError);
    expect(error).toMatchObject({ code });
  });

  test('from a job', async () => {
    const job = async () =>
      api.gatherRows(api.zeros('f32', [2, 2]), Int32Array.of(5), api.zeros('f32', [1, 2]));
    await expect(job()).rejects.toBeInstanceOf(EacMoeError);
  });
});

describe('withSignal', () => {
  test('rejects at once when the signal has fired', async () => {
    const run = jest.fn();
    await expect(withSignal(AbortSignal.abort('enough'), run)).rejects.toMatchObject({
      code: 'ABORTED',
      cause: 'enough',
    });
    expect(run).not.toHaveBeenCalled();
  });

  test('stops a job', async () => {
    const controller = new AbortController();
    const h = api.zeros('f32', [1024, 1024]);
    const job = withSignal(controller.signal, (control) => api.factorHessian(h, 0.01, false, control));
    controller.abort();
    await expect(job).rejects.toMatchObject({ code: 'ABORTED' });
  });

  test('passes results and other errors on, and lets go of the signal', async () => {
    const { signal } = new AbortController();
    const remove = jest.spyOn(signal, 'removeEventListener');
    await expect(withSignal(signal, async (control) => control.length)).resolves.toBe(1);
    await expect(withSignal(signal, () => Promise.reject(new RangeError('mine')))).rejects.toThrow(
      RangeError,
    );
    await expect(withSignal(undefined, async () => 'plain')).resolves.toBe('plain');
    expect(remove).toHaveBeenCalledTimes(2);
  });
});

describe('a binary that does not load', () => {
  const directory = fs.mkdtempSync(path.join(os.tmpdir(), 'eac-moe-'));
  afterAll(() => {
    delete process.env.EAC_MOE_BINARY;
    fs.rmSync(directory, { recursive: true });
  });

  test.each([
    ['is missing', undefined, /missing/],
    ['is for another machine', 'not a binary '.repeat(100), /another machine/],
  ])('because it %s: the error says so and names the source build', (_name, content, reason) => {
    const file = path.join(directory, `${content ? 'broken' : 'none'}.node`);
    if (content) fs.writeFileSync(file, content);
    process.env.EAC_MOE_BINARY = file;
    jest.isolateModules(() => {
      const fresh = require('../lib/native') as typeof import('../lib/native');
      const error = capture(fresh.native) as EacMoeError;
      expect(error).toMatchObject({ name: 'EacMoeError', code: 'NATIVE_UNAVAILABLE' });
      expect(error.message).toMatch(reason);
      expect(error.message).toContain(file);
      expect(error.message).toMatch(/install\.js" --build$/);
    });
  });
});
