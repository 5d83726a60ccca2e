/**
 * config.json, read field by field with errors that name the field. Both spellings of Hugging Face are understood: the older
 * `rope_theta` + `rope_scaling` { type | rope_type } + `torch_dtype`, and the newer `rope_parameters` { rope_type, rope_theta } + `dtype`.
 */
import { EacMoeError } from '../errors';
import { describeValue, readJsonObject } from './files';

/** Typed access to the fields of one JSON object. `null` counts as absent, as Hugging Face writes unset fields. */
export class FieldReader {
  readonly raw: Readonly<Record<string, unknown>>;
  /** What errors begin with, e.g. 'config.json'. */
  readonly where: string;

  constructor(raw: Readonly<Record<string, unknown>>, where: string) {
    this.raw = raw;
    this.where = where;
  }

  fail(key: string, expected: string): never {
    throw new EacMoeError(
      'INVALID_CHECKPOINT',
      `${this.where}: ${key} must be ${expected}, found ${describeValue(this.value(key))}`,
    );
  }

  value(key: string): unknown {
    return Object.hasOwn(this.raw, key) ? (this.raw[key] ?? undefined) : undefined;
  }

  has(key: string): boolean {
    return this.value(key) !== undefined;
  }

  #read<T>(key: string, fallback: T | undefined, expected: string, valid: (value: unknown) => boolean): T {
    const value = this.value(key);
    if (value === undefined && fallback !== undefined) return fallback;
    if (!valid(value)) this.fail(key, expected);
    return value as T;
  }

  positiveInteger(key: string, fallback?: number): number {
    return this.#read(
      key,
      fallback,
      'a positive integer',
      (v) => Number.isSafeInteger(v) && (v as number) > 0,
    );
  }

  nonNegativeInteger(key: string, fallback?: number): number {
    return this.#read(
      key,
      fallback,
      'a non-negative integer',
      (v) => Number.isSafeInteger(v) && (v as number) >= 0,
    );
  }

  positiveNumber(key: string, fallback?: number): number {
    return this.#read(
      key,
      fallback,
      'a positive number',
      (v) => typeof v === 'number' && Number.isFinite(v) && v > 0,
    );
  }

  nonNegativeNumber(key: string, fallback?: number): number {
    return this.#read(
      key,
      fallback,
      'a non-negative number',
      (v) => typeof v === 'number' && Number.isFinite(v) && v >= 0,
    );
  }

  boolean(key: string, fallback?: boolean): boolean {
    return this.#read(key, fallback, 'true or false', (v) => typeof v === 'boolean');
  }

  string(key: string, fallback?: string): string {
    return this.#read(key, fallback, 'a string', (v) => typeof v === 'string');
  }

  /** A list of numbers, all positive, of `length` if given. */
  positiveNumbers(key: string, length?: number): number[] {
    const expected = `a list of ${length ?? 'some'} positive numbers`;
    const valid = (v: unknown): boolean =>
      Array.isArray(v) &&
      (length === undefined || v.length === length) &&
      v.every((n) => typeof n === 'number' && Number.isFinite(n) && n > 0);
    return this.#read<number[]>(key, undefined, expected, valid);
  }

  integers(key: string, fallback?: number[]): number[] {
    return this.#read(
      key,
      fallback,
      'a list of integers',
      (v) => Array.isArray(v) && v.every((n) => Number.isSafeInteger(n)),
    );
  }

  strings(key: string, fallback?: string[]): string[] {
    return this.#read(
      key,
      fallback,
      'a list of strings',
      (v) => Array.isArray(v) && v.every((n) => typeof n === 'string'),
    );
  }

  /** A nested object, or undefined when absent. */
  object(key: string): FieldReader | undefined {
    const value = this.value(key);
    if (value === undefined) return undefined;
    if (typeof value !== 'object' || Array.isArray(value)) this.fail(key, 'an object');
    return new FieldReader(value as Record<string, unknown>, `${this.where}: ${key}`);
  }
}

/** Rotary embedding settings, whichever way config.json spells them. */
export interface RopeConfig {
  /** 'default', 'linear', 'longrope', 'yarn', ... ('su' of early Phi-3 is longrope). */
  type: string;
  /** Absent where config.json leaves it to the family's default. */
  theta: number | undefined;
  /** The type's own fields: factor, short_factor, ... Empty for 'default'. */
  fields: FieldReader;
  /** Tokens the model was first trained with, for the types that need it. */
  originalMaxPositions: number | undefined;
}

export interface ModelConfig extends FieldReader {
  readonly modelType: string;
  /** 'bfloat16', 'float16', 'float32'; 'bfloat16' where config.json is silent. */
  readonly dtype: string;
  readonly rope: RopeConfig;
}

function readRope(config: FieldReader): RopeConfig {
  const fields =
    config.object('rope_parameters') ??
    config.object('rope_scaling') ??
    new FieldReader({}, `${config.where}: rope_scaling`);
  const nested = Object.entries(fields.raw).find(
    ([, v]) => typeof v === 'object' && v !== null && !Array.isArray(v),
  );
  if (nested) {
    throw new EacMoeError(
      'UNSUPPORTED_MODEL',
      `${fields.where}: a rotary embedding per layer type ('${nested[0]}') is not supported`,
    );
  }
  const type = fields.string('rope_type', fields.string('type', 'default'));
  const theta = fields.has('rope_theta') ? fields.positiveNumber('rope_theta') : undefined;
  const original = [fields, config].find((f) => f.has('original_max_position_embeddings'));
  return {
    type: type === 'su' ? 'longrope' : type,
    theta: theta ?? (config.has('rope_theta') ? config.positiveNumber('rope_theta') : undefined),
    fields,
    originalMaxPositions: original?.positiveInteger('original_max_position_embeddings'),
  };
}

class NormalisedConfig extends FieldReader implements ModelConfig {
  readonly modelType: string;
  readonly dtype: string;
  readonly rope: RopeConfig;

  constructor(raw: Record<string, unknown>, where: string) {
    super(raw, where);
    this.modelType = this.string('model_type');
    this.dtype = this.string('dtype', this.string('torch_dtype', 'bfloat16')).replace(/^torch\./, '');
    this.rope = readRope(this);
  }
}

/** `where` is what errors begin with: the file's name or path. */
export function normaliseConfig(raw: Record<string, unknown>, where = 'config.json'): ModelConfig {
  return new NormalisedConfig(raw, where);
}

export function readConfig(path: string): ModelConfig {
  return normaliseConfig(readJsonObject(path), path);
}
