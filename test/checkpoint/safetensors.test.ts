import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { removeTemporaryFiles, writeJson } from '../../lib/checkpoint/files';
import { openSafetensors, writeSafetensors } from '../../lib/checkpoint/safetensors';
import { EacMoeError } from '../../lib/errors';
import { native } from '../../lib/native';
import { expectError, expectRejection, rawSafetensors, scratch } from './helpers';

const dir = scratch();
const path = join(dir, 'x.safetensors');

function openRaw(header: unknown, dataBytes: number, length?: bigint): void {
  writeFileSync(path, rawSafetensors(header, dataBytes, length));
  openSafetensors(path).dispose();
}

const tensor = (begin: number, end: number, shape = [2, 3], dtype = 'F32') => ({
  dtype,
  shape,
  data_offsets: [begin, end],
});

describe('a damaged file is refused by name', () => {
  test.each<[string, unknown, number, bigint | undefined, string[]]>([
    ['a header length beyond the file', '{}', 0, 1000n, ['1000 bytes', 'only 2 follow']],
    ['a header length of 2^63', '{}', 0, 1n << 63n, ['9223372036854775808 bytes']],
    ['no JSON', 'not json', 0, undefined, ['not valid JSON']],
    ['a JSON list', '[1]', 0, undefined, ['must be a JSON object', '[1]']],
    ['metadata of another kind', { __metadata__: { a: 1 } }, 0, undefined, ['__metadata__']],
    ['a tensor that is no object', { w: 5 }, 0, undefined, ["'w'", 'found 5']],
    ['an unknown dtype', { w: tensor(0, 24, [2, 3], 'F31') }, 24, undefined, ["'w'", '"F31"', 'BF16']],
    [
      'a dtype named like a method',
      { w: tensor(0, 24, [2, 3], 'toString') },
      24,
      undefined,
      ['unknown dtype'],
    ],
    ['a fractional shape', { w: tensor(0, 24, [2.5, 3]) }, 24, undefined, ["'w'", '[2.5,3]']],
    ['a negative shape', { w: tensor(0, 24, [-2, 3]) }, 24, undefined, ["'w'", '[-2,3]']],
    ['a shape beyond 2^53', { w: tensor(0, 24, [2 ** 40, 2 ** 40]) }, 24, undefined, ["'w'", 'addressable']],
    [
      'offsets that are no pair',
      { w: { dtype: 'F32', shape: [1], data_offsets: [0] } },
      4,
      undefined,
      ["'w'", '[0]'],
    ],
    ['negative offsets', { w: tensor(-24, 0) }, 24, undefined, ["'w'", '[-24,0]']],
    ['offsets in reverse', { w: tensor(24, 0) }, 24, undefined, ["'w'", 'end at 0', 'begin 24']],
    [
      'offsets that contradict the shape',
      { w: tensor(0, 20) },
      20,
      undefined,
      ["'w'", '20 bytes', 'takes 24'],
    ],
    ['offsets beyond the file', { w: tensor(0, 24) }, 20, undefined, ["'w'", 'end at 24', '20 bytes']],
    [
      'overlapping tensors',
      { a: tensor(0, 24), b: tensor(16, 40) },
      40,
      undefined,
      ["'a' and 'b' overlap", 'ends at 24', 'begins at 16'],
    ],
    ['two tensors in one place', { a: tensor(0, 24), b: tensor(0, 24) }, 24, undefined, ['overlap']],
    [
      'a hole between tensors',
      { a: tensor(0, 24), b: tensor(32, 56) },
      56,
      undefined,
      ["'b'", 'bytes 24 to 32'],
    ],
    ['a hole at the start', { a: tensor(8, 32) }, 32, undefined, ["'a'", 'bytes 0 to 8']],
    ['bytes after the last tensor', { a: tensor(0, 24) }, 30, undefined, ['take 24', '30 bytes', '6 belong']],
    [
      'a tensor twice',
      '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
      1,
      undefined,
      ["'a' twice"],
    ],
    [
      'a tensor twice, once escaped',
      '{"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
      1,
      undefined,
      ["'a' twice"],
    ],
    [
      'a field twice',
      '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"dtype":"I8"}}',
      1,
      undefined,
      ["'dtype' twice"],
    ],
  ])('%s', (_, header, dataBytes, length, texts) => {
    expectError(() => openRaw(header, dataBytes, length), 'INVALID_CHECKPOINT', path, ...texts);
  });

  test('shorter than a header length', () => {
    writeFileSync(path, Buffer.alloc(5));
    expectError(() => openSafetensors(path), 'INVALID_CHECKPOINT', path, 'has 5 bytes');
    writeFileSync(path, '');
    expectError(() => openSafetensors(path), 'INVALID_CHECKPOINT', path, 'has 0 bytes');
  });

  test('a header that is not UTF-8', () => {
    writeFileSync(path, Buffer.concat([rawSafetensors('', 0, 4n), Buffer.from([0x7b, 0xff, 0xfe, 0x7d])]));
    expectError(() => openSafetensors(path), 'INVALID_CHECKPOINT', path, 'UTF-8');
  });

  test('a Git LFS pointer', () => {
    writeFileSync(path, 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n');
    expectError(() => openSafetensors(path), 'INVALID_CHECKPOINT', path, 'git lfs pull');
  });

  test('every truncation of a good file', () => {
    const whole = rawSafetensors({ a: tensor(0, 24), b: tensor(24, 28, [4], 'U8') }, 28);
    for (let n = 0; n < whole.byteLength; n++) {
      writeFileSync(path, whole.subarray(0, n));
      expectError(() => openSafetensors(path), 'INVALID_CHECKPOINT', path);
    }
  });

  test('a missing file, and a directory', () => {
    expectError(() => openSafetensors(join(dir, 'none')), 'FILE_NOT_FOUND', 'none');
    expectError(() => openSafetensors(dir), 'FILE_NOT_FOUND', dir);
  });
});

describe('reading', () => {
  test('dtypes, empty tensors, scalars, names of any kind', () => {
    const header = {
      __metadata__: { format: 'pt', note: '{"a":1,"a":2}' },
      __proto__x: tensor(0, 4, []),
      empty: tensor(4, 4, [0, 7]),
      'ü "quoted"': tensor(4, 8, [2], 'BF16'),
      long: tensor(8, 16, [1], 'I64'),
      f8: tensor(16, 19, [3], 'F8_E4M3'),
      half: tensor(19, 23, [2], 'F16'),
    };
    writeFileSync(path, rawSafetensors(header, 23));
    const file = openSafetensors(path);
    expect([...file.tensors.keys()]).toEqual(['__proto__x', 'empty', 'ü "quoted"', 'long', 'f8', 'half']);
    expect(file.metadata.format).toBe('pt');
    expect(file.tensor('__proto__x').shape).toEqual([]);
    expect(file.tensor('empty').byteLength).toBe(0);
    expect(file.tensor('ü "quoted"').dtype).toBe('bf16');
    // Misaligned in the file: copied.
    expect([...file.tensor('half').toBytes()]).toEqual([19, 20, 21, 22]);
    expect([...file.bytes('f8')]).toEqual([16, 17, 18]);
    expect([...file.tensor('f8').toArray()]).toEqual([16, 17, 18]);
    expectError(() => file.tensor('long'), 'INVALID_TENSOR', path, "'long'", 'I64', 'BF16');
    expectError(() => file.tensor('nope'), 'INVALID_TENSOR', "'nope'");
    file.release(file.tensors.keys());
    const survivor = file.tensor('__proto__x');
    file.dispose();
    expect(survivor.toBytes().byteLength).toBe(4);
    expectError(() => file.tensor('empty'), 'DISPOSED', path);
  });
});

describe('writing', () => {
  const out = join(dir, 'out.safetensors');

  test('round trip, aligned, deterministic, lazily', async () => {
    const { fromArray } = native();
    const f32 = fromArray(Float32Array.from([1, -2, 3.5, 0]), 'f32', [2, 2]);
    const bf16 = fromArray(Float32Array.from([1, 2, 3]), 'bf16', [3]);
    async function* entries() {
      yield { name: 'bytes', dtype: 'U8', shape: [3], data: Uint8Array.from([7, 8, 9]) };
      yield { name: 'bf16', data: bf16 };
      yield { name: 'one', dtype: 'F32', shape: [1], data: () => Promise.resolve(new Uint8Array(4)) };
      yield { name: '7', data: f32 };
    }
    const { bytes, names } = await writeSafetensors(out, entries());
    const first = readFileSync(out);
    expect(first.byteLength).toBe(bytes);
    expect(names).toEqual(['7', 'one', 'bf16', 'bytes']);
    await writeSafetensors(out, entries());
    expect(readFileSync(out).equals(first)).toBe(true);
    const file = openSafetensors(out);
    expect([...file.tensor('7').toArray()]).toEqual([1, -2, 3.5, 0]);
    expect([...file.tensor('bf16').toArray()]).toEqual([1, 2, 3]);
    expect([...file.bytes('bytes')]).toEqual([7, 8, 9]);
    for (const info of file.tensors.values())
      expect(info.offset % (info.dtype === 'F32' ? 4 : info.dtype === 'BF16' ? 2 : 1)).toBe(0);
    expect(file.info('7').offset % 8).toBe(0);
    file.dispose();
  });

  test('a large tensor goes out in pieces, a file of nothing too', async () => {
    const rows = 5000;
    const big = native().zeros('f32', [rows, 2048]);
    big.rows(rows - 1, rows).write(new Float32Array(2048).fill(3));
    await writeSafetensors(out, [{ name: 'big', data: big }]);
    const file = openSafetensors(out);
    expect(
      file
        .tensor('big')
        .rows(rows - 1, rows)
        .toArray()[5],
    ).toBe(3);
    file.dispose();
    await writeSafetensors(out, [], {});
    expect(openSafetensors(out).tensors.size).toBe(0);
  });

  test('nothing is left of a failed file, and the old one stays', async () => {
    const here = join(dir, 'failing');
    mkdirSync(here);
    const target = join(here, 'a.safetensors');
    await writeSafetensors(target, [{ name: 'a', dtype: 'U8', shape: [2], data: Uint8Array.of(1, 2) }]);
    const before = readFileSync(target);
    const boom = () => {
      throw new EacMoeError('NON_FINITE', 'boom');
    };
    const bad: [string, () => Promise<unknown>, ...string[]][] = [
      [
        'INVALID_ARGUMENT',
        () => writeSafetensors(target, [{ name: 'a', dtype: 'U8', shape: [3], data: Uint8Array.of(1) }]),
        "'a'",
        '1 bytes',
        'takes 3',
      ],
      [
        'INVALID_ARGUMENT',
        () => writeSafetensors(target, [{ name: 'a', dtype: 'X', shape: [3], data: Uint8Array.of(1) }]),
        "'a'",
      ],
      [
        'INVALID_ARGUMENT',
        () =>
          writeSafetensors(
            target,
            ['a', 'a'].map((name) => ({ name, dtype: 'U8', shape: [0], data: new Uint8Array() })),
          ),
        "named 'a'",
      ],
      [
        'NON_FINITE',
        () => writeSafetensors(target, [{ name: 'a', dtype: 'U8', shape: [3], data: boom }]),
        'boom',
      ],
      ['OUTPUT', () => writeSafetensors(join(here, 'none/b.safetensors'), []), 'none'],
    ];
    for (const [code, attempt, ...texts] of bad) await expectRejection(attempt(), code as 'OUTPUT', ...texts);
    expect(readdirSync(here)).toEqual(['a.safetensors']);
    expect(readFileSync(target).equals(before)).toBe(true);
  });

  test('a full disk', async () => {
    const here = join(dir, 'full');
    mkdirSync(here);
    const probe = await open(join(dir, 'probe'), 'w');
    const prototype = Object.getPrototypeOf(probe) as { write: () => Promise<unknown> };
    await probe.close();
    const full = Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' });
    const write = jest.spyOn(prototype, 'write').mockRejectedValue(full);
    const target = join(here, 'w.safetensors');
    const attempt = writeSafetensors(target, [
      { name: 'w', dtype: 'F32', shape: [25], data: new Uint8Array(100) },
    ]);
    await expectRejection(attempt, 'OUTPUT', target, 'full', 'bytes');
    write.mockRestore();
    expect(readdirSync(here)).toEqual([]);
  });

  test('JSON files, and what a killed writer left', async () => {
    const here = join(dir, 'json');
    mkdirSync(here);
    await writeJson(join(here, 'config.json'), { b: 1, a: [2] });
    expect(readFileSync(join(here, 'config.json'), 'utf8')).toBe('{\n  "b": 1,\n  "a": [\n    2\n  ]\n}\n');
    writeFileSync(join(here, '.model.safetensors.tmp-123-0'), 'half');
    removeTemporaryFiles(here);
    expect(readdirSync(here)).toEqual(['config.json']);
    expect(existsSync(join(here, 'config.json'))).toBe(true);
  });
});
