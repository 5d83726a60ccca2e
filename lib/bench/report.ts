/** A benchmark's results for people: plain tables. */
import type { MachineLimits } from './limits';
import type { PesfSaving } from './pesf';
import { plural, type BenchReport, type BenchResult } from './index';

/** 0.000123 -> '123 us' */
export function duration(seconds: number): string {
  if (seconds >= 1) return `${significant(seconds)} s`;
  return seconds >= 1e-3 ? `${significant(seconds * 1e3)} ms` : `${significant(seconds * 1e6)} us`;
}

/** Three significant digits, none cut off before the point. */
export function significant(value: number): string {
  return value >= 100 ? value.toFixed(0) : value.toPrecision(3);
}

export const share = (value: number) => `${(100 * value).toFixed(0)} %`;

/** Lines of cells, each column as wide as its widest; the first `left` columns flush left. */
export function table(rows: readonly (readonly string[])[], left = 0): string {
  const widths = rows[0]!.map((_, i) => Math.max(...rows.map((row) => row[i]!.length)));
  const line = (row: readonly string[]) =>
    row.map((cell, i) => (i < left ? cell.padEnd(widths[i]!) : cell.padStart(widths[i]!))).join('  ');
  return rows.map((row) => `${line(row).trimEnd()}\n`).join('');
}

export function limitsTable(limits: readonly MachineLimits[]): string {
  const head = ['threads', 'read GB/s', 'float32 GFLOP/s', 'int8 GOP/s'];
  const rows = limits.map((l) => [
    String(l.threads),
    ...[l.readBandwidth, l.fmaPeak, l.int8Peak].map((value) => significant(value / 1e9)),
  ]);
  return table([head, ...rows]);
}

/** Everything: the machine, its limits, and a table for each kernel and shape. */
export function textReport(report: BenchReport): string {
  const { cpu, isa, version, limits, shapes, settings, results, pesf } = report;
  const parts = [`eac-moe ${version}, ${cpu}, ${isa}\n`, limitsTable(limits)];
  for (const rows of tables(results)) {
    const { kernel, shape: name } = rows[0]!;
    const { hidden, width, experts, topK } = shapes.find((s) => s.name === name)!;
    const size = `hidden ${hidden}, expert width ${width}, ${plural(experts, 'expert')}, ${topK} a token`;
    parts.push(`${kernel}, ${name}: ${size}\n${resultTable(rows)}`);
  }
  if (pesf.length > 0) parts.push(`PESF: time saved against work skipped\n${pesfTable(pesf)}`);
  const cycle = (settings.cycleBytes / 2 ** 20).toFixed(0);
  parts.push(
    `Median, minimum and 90th percentile of one call. Weights cycled: ${cycle} MiB or one layer.\nShares: of the read bandwidth and of the arithmetic peak measured beside each sample.\n`,
  );
  return parts.join('\n');
}

function pesfTable(savings: readonly PesfSaving[]): string {
  const head = ['shape', 'threads', 'tokens', 'bits', 'alpha', 'pairs skipped', 'time saved', 'ratio'];
  const cells = savings.map((s) => [
    s.shape,
    ...[s.threads, s.tokens, s.bits, s.alpha].map(String),
    `${(100 * s.skipped).toFixed(1)} %`,
    `${(100 * s.saved).toFixed(1)} %`,
    s.ratio.toFixed(2),
  ]);
  return table([head, ...cells], 1);
}

/** Results of one kernel and shape, in the order in which they came. */
function tables(results: readonly BenchResult[]): BenchResult[][] {
  const found: BenchResult[][] = [];
  for (const result of results) {
    const [last] = found.at(-1) ?? [];
    if (last?.kernel === result.kernel && last.shape === result.shape) found.at(-1)!.push(result);
    else found.push([result]);
  }
  return found;
}

function resultTable(rows: readonly BenchResult[]): string {
  const names = [...new Set(rows.flatMap(({ parameters }) => Object.keys(parameters)))];
  const head = [
    'threads',
    ...names,
    'median',
    'min',
    'p90',
    'GB/s',
    'of read',
    'GFLOP/s',
    'of peak',
    'of bound',
  ];
  const cells = rows.map((r) => [
    String(r.threads),
    ...names.map((name) => String(r.parameters[name] ?? '')),
    ...[r.time.median, r.time.min, r.time.p90].map(duration),
    significant(r.bandwidth / 1e9),
    share(r.bandwidthShare),
    significant(r.throughput / 1e9),
    share(r.throughputShare),
    share(r.boundShare),
  ]);
  return table([head, ...cells]);
}
