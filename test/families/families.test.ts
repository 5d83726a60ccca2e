/** The table of families: made of what tests say, and about every family there is. */
import { SUPPORTED_MODEL_TYPES } from '../../lib/architecture';
import { shows } from './shows';

interface Reporter {
  cellsOf(tests: { fullName: string; status: string }[]): Map<string, string>;
  tableOf(cells: Map<string, string>): string;
  parseTable(table: string): Map<string, string>;
  differences(table: string, cells: Map<string, string>, complete: boolean): string[];
  readDocument(): { table: string };
}
const { cellsOf, tableOf, parseTable, differences, readDocument } = require('./reporter') as Reporter;

const passed = (title: string) => ({ fullName: title, status: 'passed' });
const forward = shows('mixtral', 'forward');
const gguf = shows('mixtral', 'gguf', 'refused');

test('a family can do what all tests with its mark show', () => {
  const tests = [
    passed(`${forward} at once`),
    passed(`${forward} in pieces`),
    passed(`says why ${gguf}`),
    passed('other'),
  ];
  expect([...cellsOf(tests)]).toEqual([
    ['mixtral: forward', 'yes'],
    ['mixtral: gguf', 'refused'],
  ]);
  const failed = cellsOf([...tests, { fullName: `${forward} backwards`, status: 'failed' }]);
  expect(failed.get('mixtral: forward')).toBe('failed');
  const skipped = cellsOf([...tests, { fullName: `${forward} backwards`, status: 'pending' }]);
  expect(skipped.get('mixtral: forward')).toBe('skipped');
  const differs = cellsOf([...tests, passed(shows('mixtral', 'forward', 'differs'))]);
  expect(differs.get('mixtral: forward')).toBe('differs');
  expect(() => cellsOf([passed('[mixtral: fly]')])).toThrow("'mixtral: fly'");
});

test('the table holds what was shown, and nothing else', () => {
  const table = tableOf(new Map([['b: forward', 'yes'], ['a: gguf', 'refused'], ['a: prune', 'failed']])); // prettier-ignore
  expect(table.split('\n').map((line) => line.split('|')[1]?.trim())).toEqual([
    'family',
    '------',
    '`a`',
    '`b`',
    undefined,
  ]);
  expect([...parseTable(table)]).toEqual([
    ['a: gguf', 'refused'],
    ['b: forward', 'yes'],
  ]);
});

test('a table that differs from the tests is found', () => {
  const cells = cellsOf([passed(forward), passed(gguf)]);
  const table = tableOf(cells);
  expect(differences(table, cells, true)).toEqual([]);
  expect(differences(table, new Map(), false)).toEqual([]);
  expect(differences(table, new Map(), true)).toHaveLength(2);
  expect(differences(table, new Map([['mixtral: forward', 'skipped'], ['mixtral: gguf', 'refused']]), true)).toEqual([]); // prettier-ignore
  expect(differences(table, new Map([['mixtral: forward', 'failed']]), false)).toHaveLength(1);
  expect(differences(table, new Map([['mixtral: gguf', 'yes']]), false)).toHaveLength(1);
  expect(differences(table, new Map([['phimoe: gguf', 'yes']]), false)).toHaveLength(1);
});

test('docs/families.md has every family', () => {
  const families = new Set([...parseTable(readDocument().table).keys()].map((cell) => cell.split(': ')[0]));
  expect([...families].sort()).toEqual([...SUPPORTED_MODEL_TYPES].sort());
});
