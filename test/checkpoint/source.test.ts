import { copyFileSync, cpSync, existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { copyCompanionFiles } from '../../lib/checkpoint/files';
import { openSafetensors } from '../../lib/checkpoint/safetensors';
import { Checkpoint } from '../../lib/checkpoint/source';
import { describeWith, expectError, readJson, scratch, shared, writeTensors } from './helpers';

const root = scratch();
let count = 0;

/** A model directory with two shards. */
function sharded(change: { index?: object | string; skip?: string } = {}): string {
  const dir = join(root, `m${count++}`);
  mkdirSync(dir);
  writeFileSync(join(dir, 'config.json'), '{"model_type": "mixtral"}');
  const map = { a: 's1.safetensors', b: 's1.safetensors', c: 's2.safetensors' };
  const index = change.index ?? { weight_map: map };
  writeFileSync(
    join(dir, 'model.safetensors.index.json'),
    typeof index === 'string' ? index : JSON.stringify(index),
  );
  if (change.skip !== 's1')
    writeTensors(join(dir, 's1.safetensors'), { a: { shape: [2, 3] }, b: { shape: [4] } });
  if (change.skip !== 's2') writeTensors(join(dir, 's2.safetensors'), { c: { shape: [2], dtype: 'I64' } });
  return dir;
}

test('shards', () => {
  const checkpoint = Checkpoint.open(sharded());
  expect(checkpoint.names().sort()).toEqual(['a', 'b', 'c']);
  expect(checkpoint.files()).toEqual(['s1.safetensors', 's2.safetensors']);
  expect(checkpoint.has('b')).toBe(true);
  expect(checkpoint.has('d')).toBe(false);
  expect(checkpoint.info('a')).toMatchObject({
    dtype: 'F32',
    shape: [2, 3],
    file: 's1.safetensors',
    bytes: 24,
  });
  expect(checkpoint.tensor('a', [2, 3]).shape).toEqual([2, 3]);
  expectError(
    () => checkpoint.tensor('a', [3, 2]),
    'INVALID_TENSOR',
    "'a'",
    '[2, 3]',
    'expected [3, 2]',
    's1.safetensors',
  );
  expectError(() => checkpoint.tensor('d'), 'INVALID_TENSOR', "'d' is missing");
  expectError(() => checkpoint.tensor('c'), 'INVALID_TENSOR', "'c'", 'I64');
  checkpoint.release(['a', 'c', 'none']);
  checkpoint.dispose();
  expectError(() => checkpoint.tensor('a'), 'DISPOSED');
});

test('what is wrong with a directory is said by name', () => {
  const at = (dir: string, ...texts: string[]) =>
    expectError(() => Checkpoint.open(dir), 'INVALID_CHECKPOINT', ...texts);
  const missing = (dir: string, ...texts: string[]) =>
    expectError(() => Checkpoint.open(dir), 'FILE_NOT_FOUND', ...texts);
  const map = { a: 's1.safetensors', b: 's1.safetensors', c: 's2.safetensors' };
  missing(join(root, 'nowhere'), 'nowhere', 'no such directory');
  missing(sharded({ skip: 's2' }), 's2.safetensors', 'missing', "'c'");
  at(
    sharded({ index: { weight_map: { ...map, d: 's2.safetensors' } } }),
    "'d'",
    's2.safetensors',
    'does not hold',
  );
  at(sharded({ index: { weight_map: { a: map.a, c: map.c } } }), "'b'", 's1.safetensors', 'does not list');
  at(sharded({ index: { weight_map: { ...map, b: 's2.safetensors' } } }), "'b'", 's2.safetensors');
  at(sharded({ index: { weight_map: { ...map, b: '../s1.safetensors' } } }), "'b'", '../s1.safetensors');
  at(sharded({ index: { weight_map: { ...map, b: 3 } } }), "'b'", 'found 3');
  at(sharded({ index: { weight_map: {} } }), 'no tensor');
  at(sharded({ index: { weights: map } }), 'weight_map', 'nothing');
  at(sharded({ index: '{' }), 'index.json', 'JSON');

  const dir = sharded();
  rmSync(join(dir, 'model.safetensors.index.json'));
  missing(dir, dir, 'model.safetensors.index.json', 's1.safetensors');
  writeFileSync(join(dir, 'config.json'), '[]');
  at(dir, 'config.json', '[]');
  writeFileSync(join(dir, 'config.json'), '{}');
  at(dir, 'config.json', 'model_type must be a string, found nothing');
  rmSync(join(dir, 'config.json'));
  missing(dir, 'config.json');
  missing(join(sharded(), 'config.json'), 'config.json', 'directory');
});

test('the fingerprint follows config, names, sizes and headers', () => {
  const dir = sharded();
  const first = Checkpoint.open(dir).fingerprint();
  expect(first).toMatch(/^[0-9a-f]{64}$/);
  const copy = join(root, 'copy');
  cpSync(dir, copy, { recursive: true });
  expect(Checkpoint.open(copy).fingerprint()).toBe(first);
  writeTensors(join(copy, 's2.safetensors'), { c: { shape: [1, 2], dtype: 'I64' } });
  const second = Checkpoint.open(copy).fingerprint();
  expect(second).not.toBe(first);
  writeFileSync(join(dir, 'config.json'), '{"model_type": "mixtral" }');
  expect([first, second]).not.toContain(Checkpoint.open(dir).fingerprint());
});

describeWith('goldens/mixtral', 'checkpoints of other writers', () => {
  test('sharded, bf16, as transformers wrote it', () => {
    const checkpoint = Checkpoint.open(join(shared, 'goldens/mixtral'));
    const index = readJson(join(shared, 'goldens/mixtral/model.safetensors.index.json')).weight_map as object;
    expect(checkpoint.names().sort()).toEqual(Object.keys(index).sort());
    const gate = checkpoint.tensor('model.layers.0.block_sparse_moe.gate.weight', [8, 128]);
    expect(gate.dtype).toBe('bf16');
    const values = gate.toArray() as Float32Array;
    expect(values.length).toBe(1024);
    expect(Math.max(...values.map(Math.abs))).toBeLessThan(1);
    expect(checkpoint.generationConfig.eos_token_id).toBe(2);
    checkpoint.dispose();
    expect(gate.toArray()[7]).toBe(values[7]);
  });

  test('a truncated shard', () => {
    const dir = join(root, 'truncated');
    cpSync(join(shared, 'goldens/mixtral'), dir, { recursive: true });
    const shard = join(dir, 'model-00003-of-00005.safetensors');
    const file = openSafetensors(shard);
    const bytes = Buffer.from(require('node:fs').readFileSync(shard) as Buffer).subarray(
      0,
      file.byteLength - 100,
    );
    rmSync(shard, { force: true });
    writeFileSync(shard, bytes);
    expectError(() => Checkpoint.open(dir), 'INVALID_CHECKPOINT', shard, 'truncated');
  });

  test('companion files are copied as they are', async () => {
    const to = join(root, 'companions');
    mkdirSync(to);
    await copyCompanionFiles(join(shared, 'models/trio-moe-9m'), to);
    expect(existsSync(join(to, 'tokenizer.json'))).toBe(true);
    expect(existsSync(join(to, 'config.json'))).toBe(false);
    copyFileSync(join(to, 'tokenizer.json'), join(to, 'again'));
  });
});
