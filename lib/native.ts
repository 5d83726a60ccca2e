/**
 * Finds and loads the native addon, on first use: types, help texts and pure functions work without it. The only file that
 * knows the addon exists.
 *
 * A binary is looked for in this order: the file that EAC_MOE_BINARY names, build/Release (node-gyp), prebuilds/ (bundled in
 * the published package), build-cmake/Release (cmake-js).
 */
import { existsSync } from 'node:fs';
import * as path from 'node:path';
import type { NativeBinding } from '../types/native';
import { EacMoeError, type ErrorCode } from './errors';

const packageRoot = path.dirname(__dirname);

type AnyFunction = (this: unknown, ...args: unknown[]) => unknown;

let binding: NativeBinding | undefined;

/** The native binding. Its functions, and the methods of its handles, throw and reject with EacMoeError. */
export function native(): NativeBinding {
  binding ??= withErrors(loadBinding());
  return binding;
}

/**
 * Runs a native job that `signal` can stop: `run` passes `control` on to the native functions that take one, and an abort
 * raises control[0]. Rejects with code ABORTED, at once if the signal has fired before.
 */
export async function withSignal<T>(
  signal: AbortSignal | undefined,
  run: (control: Int32Array) => Promise<T>,
): Promise<T> {
  const control = new Int32Array(1);
  if (!signal) return run(control);
  if (signal.aborted) throw abortError(signal);
  const onAbort = () => Atomics.store(control, 0, 1);
  signal.addEventListener('abort', onAbort, { once: true });
  try {
    return await run(control);
  } catch (error) {
    if (signal.aborted && error instanceof EacMoeError && error.code === 'ABORTED') throw abortError(signal);
    throw error;
  } finally {
    signal.removeEventListener('abort', onAbort);
  }
}

export function abortError(signal: AbortSignal): EacMoeError {
  return new EacMoeError('ABORTED', 'the operation was aborted', { cause: signal.reason });
}

function loadBinding(): object {
  const named = process.env.EAC_MOE_BINARY;
  const cmake = path.join(packageRoot, 'build-cmake', 'Release', 'eac_moe.node');
  let file: string | undefined = named;
  if (!file) {
    // Within the function, so that a missing dependency is reported like a missing binary.
    try {
      // eslint-disable-next-line @typescript-eslint/no-require-imports
      const finder = require('node-gyp-build') as { resolve(directory: string): string };
      file = finder.resolve(packageRoot);
    } catch (error) {
      if (!existsSync(cmake)) throw unavailable(undefined, error);
      file = cmake;
    }
  }
  try {
    // eslint-disable-next-line @typescript-eslint/no-require-imports
    return require(path.resolve(file)) as object;
  } catch (error) {
    throw unavailable(file, error);
  }
}

/** What is the matter, why that may be, and what to do. */
function unavailable(file: string | undefined, cause: unknown): EacMoeError {
  const platform = `${process.platform}-${process.arch}`;
  const rebuild = `node ${JSON.stringify(path.join(packageRoot, 'scripts', 'install.js'))} --build`;
  const cure = `Build it from source (this needs Python 3, make and a C++20 compiler): ${rebuild}`;
  if (!file) {
    const why = `this package has no binary for ${platform}, Node ${process.versions.node}, and install scripts, which would have built one, may be switched off`;
    return new EacMoeError('NATIVE_UNAVAILABLE', `no native addon found: ${why}. ${cure}`, { cause });
  }
  const reason = String((cause as { message?: unknown }).message ?? cause);
  let likely = '';
  if (/GLIBC|CXXABI|ld-musl|libc\.musl/.test(reason)) {
    likely = ' The binary was built for another C library than this system has.';
  } else if (/invalid ELF header|wrong ELF class|mach-o|architecture|Exec format/i.test(reason)) {
    likely = ` The binary is not for ${platform}: node_modules may have been copied from another machine.`;
  } else if (/cannot find module|no such file/i.test(reason)) {
    likely = ' The file, or a library that it needs, is missing.';
  }
  const message = `the native addon ${file} does not load: ${reason}.${likely} ${cure}`;
  return new EacMoeError('NATIVE_UNAVAILABLE', message, { cause });
}

const codes: ReadonlySet<string> = new Set<ErrorCode>([
  'INVALID_ARGUMENT',
  'FILE_NOT_FOUND',
  'INVALID_CHECKPOINT',
  'INVALID_TENSOR',
  'NON_FINITE',
  'UNSUPPORTED_MODEL',
  'TOKENIZER',
  'CALIBRATION',
  'OUTPUT',
  'NOT_POSITIVE_DEFINITE',
  'OUT_OF_MEMORY',
  'DEVICE',
  'NATIVE_UNAVAILABLE',
  'ABORTED',
  'DISPOSED',
  'INTERNAL',
]);

/** Native code throws `{ code, message }`; what else it throws (a failed argument conversion) is a mistake of ours. */
function toEacMoeError(thrown: unknown): EacMoeError {
  if (thrown instanceof EacMoeError) return thrown;
  const { code, message, name } = Object(thrown) as Record<string, unknown>;
  if (typeof code === 'string' && codes.has(code)) return new EacMoeError(code as ErrorCode, String(message));
  const guess = name === 'TypeError' ? 'INVALID_ARGUMENT' : 'INTERNAL';
  return new EacMoeError(guess, String(message ?? thrown), { cause: thrown });
}

/**
 * The addon is loaded once a process, this module perhaps more often (jest gives each test file a copy, with an EacMoeError of
 * its own). So handle prototypes are wrapped once and convert through this box, which the latest copy fills.
 */
interface Converter {
  convert: (thrown: unknown) => EacMoeError;
}
const converterKey = Symbol.for('eac-moe.converter');

function withErrors(raw: object): NativeBinding {
  const api: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(raw)) {
    if (typeof value !== 'function') api[name] = value;
    else if (isClass(value)) api[name] = wrapClass(value);
    else api[name] = wrap(value as AnyFunction, { convert: toEacMoeError });
  }
  return api as unknown as NativeBinding;
}

function isClass(value: object): value is { prototype: object } {
  const prototype = (value as { prototype?: unknown }).prototype;
  return typeof prototype === 'object' && Object.getOwnPropertyNames(prototype).length > 1;
}

function wrapClass<T extends { prototype: object }>(constructor: T): T {
  const prototype = constructor.prototype as Record<string | symbol, unknown>;
  const known = prototype[converterKey] as Converter | undefined;
  if (known) {
    known.convert = toEacMoeError;
    return constructor;
  }
  // Methods that Node-API defines cannot be redefined: a prototype in front of theirs holds the wrapped ones.
  const converter: Converter = { convert: toEacMoeError };
  const front: object = Object.create(prototype, { [converterKey]: { value: converter } });
  for (const [name, property] of Object.entries(Object.getOwnPropertyDescriptors(prototype))) {
    const { value, get } = property as { value?: unknown; get?: AnyFunction };
    if (name === 'constructor') Object.defineProperty(front, name, { value: constructor });
    else if (get) Object.defineProperty(front, name, { get: wrap(get, converter) });
    else if (typeof value === 'function') {
      Object.defineProperty(front, name, { value: wrap(value as AnyFunction, converter) });
    }
  }
  (constructor as { prototype: object }).prototype = front;
  return constructor;
}

function wrap(call: AnyFunction, converter: Converter): AnyFunction {
  const wrapped: AnyFunction = function (...args) {
    let result: unknown;
    try {
      result = call.apply(this, args);
    } catch (error) {
      throw converter.convert(error);
    }
    if (!isPromise(result)) return result;
    return result.then(undefined, (error: unknown) => {
      throw converter.convert(error);
    });
  };
  return Object.defineProperty(wrapped, 'name', { value: call.name });
}

/** By shape: a promise of another realm is no `instanceof Promise`. */
function isPromise(value: unknown): value is Promise<unknown> {
  return (
    typeof value === 'object' && value !== null && typeof (value as { then?: unknown }).then === 'function'
  );
}
