/**
 * Writes the tables of docs/performance.md from the benchmark's own output.
 *
 *   npm run --silent bench -- --json [...] > avx512.json
 *   EAC_MOE_ISA=avx2 npm run --silent bench -- --json [...] > avx2.json
 *   npm run bench:docs -- avx512.json avx2.json
 *
 * Reports of one machine and instruction set (`isa` and `cpu`) become one section: run the shapes and kernels one by one if that suits.
 */
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { mergeReports, markdownReport } from '../lib/bench/markdown';
import type { BenchReport } from '../lib/bench';

const file = join(__dirname, '..', 'docs', 'performance.md');
const [begin, end] = ['<!-- tables: npm run bench:docs -->', '<!-- end of tables -->'];

const paths = process.argv.slice(2);
if (paths.length === 0) {
  console.error('usage: npm run bench:docs -- <report.json>...');
  process.exit(2);
}
const reports = paths.map((path) => JSON.parse(readFileSync(path, 'utf8')) as BenchReport);
const text = readFileSync(file, 'utf8');
const [before, rest] = text.split(begin);
const after = rest?.split(end)[1];
if (after === undefined) throw new Error(`${file} has no lines '${begin}' and '${end}'`);
writeFileSync(file, `${before}${begin}\n\n${markdownReport(mergeReports(reports))}\n${end}${after}`);
