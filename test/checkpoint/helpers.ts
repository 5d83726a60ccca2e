/** Safetensors files made byte by byte, model directories made of nothing, and expectations about errors. */
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { EacMoeError, type ErrorCode } from '../../lib/errors';

export const shared = join(__dirname, '../../../shared');

/** describe(), or a loud skip where the reference files are not there. */
export function describeWith(path: string, title: string, body: () => void): void {
  if (existsSync(join(shared, path))) describe(title, body);
  else {
    console.warn(`SKIPPED: ${title}: ../shared/${path} is missing`);
    describe.skip(title, body);
  }
}

/** A fresh directory, removed after the test file. */
export function scratch(): string {
  const dir = mkdtempSync(join(tmpdir(), 'eac-moe-'));
  afterAll(() => rmSync(dir, { recursive: true, force: true }));
  return dir;
}

export function errorOf(action: () => unknown): EacMoeError {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(EacMoeError);
    return error as EacMoeError;
  }
  throw new Error('expected an error');
}

/** Expects an EacMoeError with this code and all these texts in its message. */
export function expectError(action: () => unknown, code: ErrorCode, ...texts: string[]): void {
  const error = errorOf(action);
  for (const text of texts) expect(error.message).toContain(text);
  expect(error.code).toBe(code);
}

export async function expectRejection(
  promise: Promise<unknown>,
  code: ErrorCode,
  ...texts: string[]
): Promise<void> {
  const error: unknown = await promise.then(
    () => undefined,
    (e: unknown) => e,
  );
  expectError(
    () => {
      if (error) throw error;
    },
    code,
    ...texts,
  );
}

/** A safetensors file from raw parts; `header` may be anything. */
export function rawSafetensors(header: unknown, dataBytes: number, length?: bigint): Buffer {
  const json = typeof header === 'string' ? Buffer.from(header) : Buffer.from(JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(length ?? BigInt(json.byteLength));
  const data = Buffer.alloc(dataBytes);
  for (let i = 0; i < dataBytes; i++) data[i] = i % 251;
  return Buffer.concat([prefix, json, data]);
}

/** A file of f32 tensors with these shapes, each filled with its index. */
export function writeTensors(
  path: string,
  tensors: Record<string, { dtype?: string; shape: number[] }>,
): void {
  const header: Record<string, unknown> = {};
  let at = 0;
  for (const [name, { dtype = 'F32', shape }] of Object.entries(tensors)) {
    const width = { F32: 4, F16: 2, BF16: 2, I32: 4, I64: 8, U8: 1, F8_E4M3: 1 }[dtype]!;
    const bytes = shape.reduce((a, b) => a * b, width);
    header[name] = { dtype, shape, data_offsets: [at, at + bytes] };
    at += bytes;
  }
  writeFileSync(path, rawSafetensors(header, at));
}

export function readJson(path: string): Record<string, unknown> {
  return JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>;
}
