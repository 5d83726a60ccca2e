/**
 * `quantization_config`: one default and, under `dynamic`, overrides keyed by regular expressions over module names, as GPTQModel
 * defines them: '+:regex' (or no prefix) sets fields, '-:regex' leaves a module unquantized; the first that matches from the name's
 * start wins.
 */
import { EacMoeError } from '../errors';

export interface ModuleQuantization {
  bits: number;
  /** Infinity: one group a row (group_size -1 in files). */
  groupSize: number;
  symmetric: boolean;
}

export interface QuantizationConfig {
  quant_method: 'gptq';
  checkpoint_format: 'gptq_v2';
  bits: number;
  group_size: number;
  desc_act: false;
  sym: boolean;
  lm_head: false;
  dynamic?: Record<string, { bits?: number; group_size?: number; sym?: boolean }>;
  meta: { quantizer: string[] };
}

export interface Override {
  /** With its prefix. */
  pattern: string;
  /** null: not quantized. */
  value: ModuleQuantization | null;
}

/** A function from module name to quantization: the first override that matches, else `base`. */
export function compileOverrides(
  overrides: Override[],
  base: ModuleQuantization,
  where: string,
): (module: string) => ModuleQuantization | null {
  const compiled = overrides.map(({ pattern, value }) => {
    try {
      // Sticky at 0 is Python's re.match: the name's start, not its whole.
      return { regex: new RegExp(pattern.replace(/^[+-]:/, ''), 'y'), value };
    } catch (cause) {
      throw new EacMoeError(
        'INVALID_CHECKPOINT',
        `${where}: '${pattern}' is not a regular expression that can be read`,
        { cause },
      );
    }
  });
  return (module) => {
    for (const { regex, value } of compiled) {
      regex.lastIndex = 0;
      if (regex.test(module)) return value;
    }
    return base;
  };
}

const keyOf = (q: ModuleQuantization | null): string => (q ? `${q.bits}/${q.groupSize}/${q.symmetric}` : '-');

const escape = (text: string): string => text.replace(/[.*+?^${}()|[\]\\]/g, '\\$&');

const byNumber = (a: string, b: string): number => Number(a) - Number(b);

function alternatives(values: Iterable<string>): string {
  const sorted = [...values].sort(byNumber);
  return sorted.length === 1 ? sorted[0]! : `(?:${sorted.join('|')})`;
}

/** A module name taken apart: 'model.layers.3.mlp.experts.7.up_proj' -> ['model.layers.', '.mlp.experts.', '.up_proj'] and [3, 7]. */
function dissect(module: string): { literals: string[]; numbers: string[] } {
  const pieces = module.split(/(?<=^|\.)(\d+)(?=\.|$)/);
  return { literals: pieces.filter((_, i) => i % 2 === 0), numbers: pieces.filter((_, i) => i % 2 === 1) };
}

/** Regexes that match exactly `modules`: names that differ in numbers only share one, as far as the numbers form a grid. */
export function exactPatterns(modules: string[]): string[] {
  const skeletons = new Map<string, { literals: string[]; rows: Map<string, Set<string>> }>();
  for (const module of modules) {
    const { literals, numbers } = dissect(module);
    const skeleton = literals.join('\0');
    if (!skeletons.has(skeleton)) skeletons.set(skeleton, { literals, rows: new Map() });
    const { rows } = skeletons.get(skeleton)!;
    // The last number (the expert, or the layer where there is none) is gathered per prefix of the others (the layer).
    const prefix = numbers.slice(0, -1).join('.');
    if (!rows.has(prefix)) rows.set(prefix, new Set());
    rows.get(prefix)!.add(numbers[numbers.length - 1] ?? '');
  }
  return [...skeletons.values()].flatMap(({ literals, rows }) => {
    const prefixesByLast = new Map<string, string[]>();
    for (const [prefix, last] of rows) {
      const key = [...last].sort(byNumber).join('|');
      prefixesByLast.set(key, [...(prefixesByLast.get(key) ?? []), prefix]);
    }
    return [...prefixesByLast].map(([last, prefixes]) => joinPattern(literals, prefixes, last.split('|')));
  });
}

function joinPattern(literals: string[], prefixes: string[], last: string[]): string {
  const parts = literals.map(escape);
  if (parts.length === 1) return `^${parts[0]}$`;
  if (parts.length === 2) return `^${parts[0]}${alternatives(last)}${parts[1]}$`;
  if (parts.length === 3)
    return `^${parts[0]}${alternatives(prefixes)}${parts[1]}${alternatives(last)}${parts[2]}$`;
  // More than two numbers: spell the prefixes out.
  const heads = prefixes.map(
    (prefix) =>
      prefix
        .split('.')
        .map((n, i) => parts[i] + n)
        .join('') + parts[parts.length - 2],
  );
  return `^(?:${heads.join('|')})${alternatives(last)}${parts[parts.length - 1]}$`;
}

/**
 * The `quantization_config` for these modules (null: linear layers left unquantized). The commonest setting becomes the default, the
 * others get overrides that match exactly their modules, so the order of overrides does not matter.
 */
export function quantizationConfig(
  modules: ReadonlyMap<string, ModuleQuantization | null>,
  quantizer: string,
): QuantizationConfig {
  const settings = new Map<string, { value: ModuleQuantization | null; modules: string[] }>();
  for (const [module, value] of modules) {
    const key = keyOf(value);
    if (!settings.has(key)) settings.set(key, { value, modules: [] });
    settings.get(key)!.modules.push(module);
  }
  const quantized = [...settings.values()].filter((s) => s.value !== null);
  if (quantized.length === 0)
    throw new EacMoeError('INVALID_ARGUMENT', 'no module is quantized: every one is left at 16 bit');
  const base = quantized.reduce((best, s) => (s.modules.length > best.modules.length ? s : best)).value!;
  const groupSize = (q: ModuleQuantization): number => (Number.isFinite(q.groupSize) ? q.groupSize : -1);

  const dynamic: NonNullable<QuantizationConfig['dynamic']> = {};
  for (const { value, modules: names } of settings.values()) {
    if (value === base) continue;
    for (const pattern of exactPatterns(names)) {
      if (value === null) dynamic[`-:${pattern}`] = {};
      else dynamic[`+:${pattern}`] = { bits: value.bits, group_size: groupSize(value), sym: value.symmetric };
    }
  }
  return {
    quant_method: 'gptq',
    checkpoint_format: 'gptq_v2',
    bits: base.bits,
    group_size: groupSize(base),
    desc_act: false,
    sym: base.symmetric,
    lm_head: false,
    ...(Object.keys(dynamic).length > 0 ? { dynamic } : {}),
    meta: { quantizer: [quantizer] },
  };
}
