/**
 * A jest reporter that knows from the marks in the titles (shows.ts) what tests have shown of each family. With EAC_MOE_FAMILIES=write
 * (`npm run docs:families`) it writes the table of docs/families.md; in any other run it holds the table against the tests that ran, and
 * fails the run where they differ.
 */
const { readFileSync, writeFileSync } = require('node:fs');
const { join } = require('node:path');

const FILE = join(__dirname, '..', '..', 'docs', 'families.md');
const [BEGIN, END] = ['<!-- table: npm run docs:families -->', '<!-- end of table -->'];
const COLUMNS = {
  forward: 'forward',
  quantize: 'quantize, eval',
  prune: 'prune',
  gptq: 'export: gptq',
  'compressed-tensors': 'compressed-tensors',
  gguf: 'gguf',
};
const CURE = 'run `npm run docs:families` and commit docs/families.md';

/**
 * What tests say of each `family: capability`: `yes`, `refused` or `differs` where all of them passed, `failed` where one did not, `skipped` where not all
 * ran.
 *
 * @param {{ fullName: string, status: string }[]} tests
 * @returns {Map<string, string>}
 */
function cellsOf(tests) {
  const cells = new Map();
  const rank = ['yes', 'refused', 'differs', 'skipped', 'failed'];
  for (const { fullName, status } of tests) {
    for (const [, cell, passed = 'yes'] of fullName.matchAll(/\[(\w+: [-\w]+)(?: (refused|differs))?\]/g)) {
      const said = status === 'passed' ? passed : status === 'failed' ? 'failed' : 'skipped';
      const before = cells.get(cell);
      // Of several, the one that promises least.
      if (before === undefined || rank.indexOf(said) > rank.indexOf(before)) cells.set(cell, said);
    }
  }
  for (const cell of cells.keys()) {
    const capability = cell.split(': ')[1];
    if (!(capability in COLUMNS))
      throw new Error(`test/families: '${cell}' is no capability that the table has`);
  }
  return cells;
}

/** @param {Map<string, string>} cells */
function tableOf(cells) {
  const families = [...new Set([...cells.keys()].map((cell) => cell.split(': ')[0]))].sort();
  const rows = [
    ['family', ...Object.values(COLUMNS)],
    ...families.map((family) => [
      `\`${family}\``,
      ...Object.keys(COLUMNS).map((capability) => {
        const said = cells.get(`${family}: ${capability}`);
        return ['yes', 'refused', 'differs'].includes(said) ? said : '';
      }),
    ]),
  ];
  const widths = rows[0].map((_, c) => Math.max(...rows.map((row) => row[c].length)));
  const line = (row) => `| ${row.map((text, c) => text.padEnd(widths[c])).join(' | ')} |\n`;
  return line(rows[0]) + line(widths.map((n) => '-'.repeat(n))) + rows.slice(1).map(line).join('');
}

/** The cells of a table that `tableOf` wrote. */
function parseTable(table) {
  const cells = new Map();
  for (const row of table.trim().split('\n').slice(2)) {
    const [family, ...texts] = row
      .split('|')
      .slice(1, -1)
      .map((text) => text.trim().replaceAll('`', ''));
    Object.keys(COLUMNS).forEach(
      (capability, c) => texts[c] && cells.set(`${family}: ${capability}`, texts[c]),
    );
  }
  return cells;
}

/**
 * Where the table and the tests differ; `complete`: all tests were asked for, so what is in the table must have been tested.
 *
 * @returns {string[]}
 */
function differences(table, cells, complete) {
  const written = parseTable(table);
  const found = [];
  for (const [cell, said] of cells) {
    if (said === 'skipped') continue;
    const has = written.get(cell) ?? 'nothing';
    const shown = said === 'failed' ? 'nothing' : said;
    if (has !== shown) found.push(`${cell}: the table says ${has}, the tests ${said}`);
  }
  for (const [cell, has] of written)
    if (complete && !cells.has(cell))
      found.push(`${cell}: the table says ${has}, and no test is marked with it`);
  return found;
}

class FamiliesReporter {
  #config;
  #error;

  constructor(globalConfig) {
    this.#config = globalConfig;
  }

  onRunComplete(_, { testResults }) {
    try {
      const cells = cellsOf(testResults.flatMap((file) => file.testResults));
      const failed = testResults.some((file) => file.testExecError);
      if (process.env.EAC_MOE_FAMILIES === 'write') this.#write(cells, failed);
      else this.#check(cells, !failed && this.#isComplete());
    } catch (error) {
      this.#error = error;
      console.error(`\n${error.message}`);
    }
  }

  getLastError() {
    return this.#error;
  }

  #check(cells, complete) {
    const found = differences(readDocument().table, cells, complete);
    if (found.length > 0)
      throw new Error(`docs/families.md is not what the tests say; ${CURE}:\n${found.join('\n')}`);
  }

  #write(cells, failed) {
    const missing = [...cells].filter(([, said]) => said === 'failed' || said === 'skipped');
    if (failed || missing.length > 0) {
      const which = missing.map(([cell, said]) => `${cell} ${said}`).join(', ');
      throw new Error(`docs/families.md was left alone: ${which || 'a test file could not run'}`);
    }
    const { before, after } = readDocument();
    writeFileSync(FILE, `${before}${BEGIN}\n\n${tableOf(cells)}\n${END}${after}`);
  }

  /** No option leaves tests out. */
  #isComplete() {
    const { testPathPatterns, testNamePattern, onlyChanged, findRelatedTests, shard, onlyFailures } =
      this.#config;
    const some = testPathPatterns?.patterns?.length > 0 || shard;
    return !(some || testNamePattern || onlyChanged || findRelatedTests || onlyFailures);
  }
}

function readDocument() {
  const text = readFileSync(FILE, 'utf8');
  const [before, rest] = text.split(`${BEGIN}\n\n`);
  const [table, after] = rest?.split(`\n${END}`) ?? [];
  if (after === undefined) throw new Error(`docs/families.md has no lines '${BEGIN}' and '${END}'`);
  return { before, table, after };
}

module.exports = Object.assign(FamiliesReporter, { cellsOf, tableOf, parseTable, differences, readDocument });
