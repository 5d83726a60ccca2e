import { normaliseConfig } from '../../lib/checkpoint/config';
import { expectError } from './helpers';

const base = { model_type: 'mixtral' };

test('the older and the newer spelling of rotary settings', () => {
  const older = normaliseConfig({
    ...base,
    rope_theta: 5e5,
    rope_scaling: { type: 'linear', factor: 4 },
    torch_dtype: 'float16',
  });
  const newer = normaliseConfig({
    ...base,
    rope_parameters: { rope_type: 'linear', rope_theta: 5e5, factor: 4 },
    dtype: 'float16',
  });
  for (const { rope, dtype } of [older, newer]) {
    expect([rope.type, rope.theta, rope.fields.positiveNumber('factor'), dtype]).toEqual([
      'linear',
      5e5,
      4,
      'float16',
    ]);
  }
  expect(normaliseConfig({ ...base, rope_scaling: null, rope_theta: 10 }).rope).toMatchObject({
    type: 'default',
    theta: 10,
  });
  expect(normaliseConfig({ ...base, rope_parameters: { rope_type: 'default' } }).rope.theta).toBeUndefined();
  expect(
    normaliseConfig({ ...base, rope_scaling: { type: 'su', original_max_position_embeddings: 9 } }).rope,
  ).toMatchObject({
    type: 'longrope',
    originalMaxPositions: 9,
  });
  expect(normaliseConfig({ ...base, original_max_position_embeddings: 7 }).rope.originalMaxPositions).toBe(7);
  expect(normaliseConfig({ ...base, dtype: 'torch.bfloat16' }).dtype).toBe('bfloat16');
  expectError(
    () => normaliseConfig({ ...base, rope_parameters: { full_attention: { rope_type: 'default' } } }),
    'UNSUPPORTED_MODEL',
    'full_attention',
  );
});

test('fields that are wrong are named with what was found', () => {
  const config = normaliseConfig({ ...base, a: '8', b: -1, c: 2.5, d: null, e: [1, 'x'], f: {} });
  const message = (key: string) => `config.json: ${key} must be`;
  expectError(
    () => config.positiveInteger('a'),
    'INVALID_CHECKPOINT',
    message('a'),
    'a positive integer, found "8"',
  );
  expectError(() => config.positiveInteger('b'), 'INVALID_CHECKPOINT', 'found -1');
  expectError(() => config.nonNegativeInteger('b', 3), 'INVALID_CHECKPOINT', 'non-negative');
  expectError(() => config.positiveInteger('c'), 'INVALID_CHECKPOINT', 'found 2.5');
  expectError(() => config.positiveInteger('d'), 'INVALID_CHECKPOINT', 'found nothing');
  expectError(() => config.positiveInteger('toString'), 'INVALID_CHECKPOINT', 'found nothing');
  expectError(() => config.integers('e'), 'INVALID_CHECKPOINT', message('e'), '[1,"x"]');
  expectError(() => config.boolean('f'), 'INVALID_CHECKPOINT', 'true or false');
  expectError(() => config.object('a'), 'INVALID_CHECKPOINT', 'an object');
  expectError(() => config.positiveNumbers('e', 2), 'INVALID_CHECKPOINT', 'a list of 2 positive numbers');
  expectError(
    () => normaliseConfig({ model_type: 5 }),
    'INVALID_CHECKPOINT',
    'model_type must be a string, found 5',
  );
  expect(config.positiveInteger('d', 4)).toBe(4);
});
