/** A benchmark's results as Markdown tables, for docs/performance.md. */
import type { BenchReport, BenchResult } from './index';
import { betterOf } from './limits';
import { duration, share, significant } from './report';

/** Each report: the machine and its limits, each kernel's bound, time and what is left, and what PESF saves. */
export function markdownReport(reports: readonly BenchReport[]): string {
  return reports.map((report) => [machine(report), kernels(report), savings(report)].join('')).join('\n');
}

/**
 * Reports of the same machine, instruction set and settings as one, which has the best of their limits; its results keep the bounds of the
 * limits that were measured beside them.
 */
export function mergeReports(reports: readonly BenchReport[]): BenchReport[] {
  const merged = new Map<string, BenchReport>();
  for (const report of reports) {
    // However long each case took.
    const key = JSON.stringify([report.version, report.cpu, report.isa, { ...report.settings, seconds: 0 }]);
    const first = merged.get(key);
    merged.set(key, first ? join(first, report) : report);
  }
  return [...merged.values()];
}

function join(a: BenchReport, b: BenchReport): BenchReport {
  const shapes = [...a.shapes, ...b.shapes.filter(({ name }) => !a.shapes.some((s) => s.name === name))];
  const added = b.limits.filter(({ threads }) => !a.limits.some((l) => l.threads === threads));
  const limits = a.limits.map((one) => {
    const other = b.limits.find(({ threads }) => threads === one.threads);
    return other ? betterOf(one, other) : one;
  });
  return {
    ...a,
    shapes,
    limits: [...limits, ...added],
    results: [...a.results, ...b.results],
    pesf: [...a.pesf, ...b.pesf],
  };
}

function machine({ cpu, isa, limits, settings, version }: BenchReport): string {
  const rows = limits.map(({ threads, readBandwidth, fmaPeak, int8Peak }) => [
    String(threads),
    ...[readBandwidth, fmaPeak, int8Peak].map((value) => significant(value / 1e9)),
  ]);
  const { groupSize, activations, cycleBytes } = settings;
  const cycle = `${(cycleBytes / 2 ** 20).toFixed(0)} MiB of weights cycled`;
  return [
    `### ${isa}, ${cpu}\n\n`,
    `eac-moe ${version}; group size ${groupSize}, ${activations} activations, ${cycle}.\n\n`,
    table(['threads', 'read GB/s', 'float32 GFLOP/s', 'int8 GOP/s'], rows),
  ].join('');
}

function kernels({ results }: BenchReport): string {
  const head = ['kernel', 'shape', 'case', 'threads', 'MB', 'GFLOP', 'bound', 'time', 'bound / time', 'left'];
  const rows = results.map((r) => [
    r.kernel,
    r.shape,
    caseOf(r),
    String(r.threads),
    significant(r.bytes / 1e6),
    significant(r.operations / 1e9),
    `${duration(r.bound)} (${boundBy(r)})`,
    duration(r.time.median),
    share(r.boundShare),
    r.time.median > r.bound ? duration(r.time.median - r.bound) : '–',
  ]);
  return `\n${table(head, rows, 3)}`;
}

function savings({ pesf }: BenchReport): string {
  if (pesf.length === 0) return '';
  const head = ['shape', 'threads', 'tokens', 'bits', 'α', 'pairs skipped', 'time saved', 'saved / skipped'];
  const rows = pesf.map((s) => [
    s.shape,
    ...[s.threads, s.tokens, s.bits, s.alpha].map(String),
    `${(100 * s.skipped).toFixed(1)} %`,
    `${(100 * s.saved).toFixed(1)} %`,
    s.ratio.toFixed(2),
  ]);
  return `\n${table(head, rows, 1)}`;
}

function caseOf({ parameters }: BenchResult): string {
  return Object.entries(parameters)
    .map(([name, value]) => `${name} ${value}`)
    .join(', ');
}

function boundBy({ arithmetic, bandwidthShare, throughputShare }: BenchResult): string {
  return bandwidthShare >= throughputShare ? 'memory' : arithmetic;
}

/** The first `left` columns flush left, the others flush right. */
function table(head: string[], rows: string[][], left = 0): string {
  const line = (cells: string[]) => `| ${cells.join(' | ')} |\n`;
  return [head, head.map((_, i) => (i < left ? '---' : '---:')), ...rows].map(line).join('');
}
