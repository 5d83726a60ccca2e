/** Medians and text tables. */

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

/** Three significant digits. */
export function short(x: number): string {
  return x >= 100 ? x.toFixed(0) : x >= 10 ? x.toFixed(1) : x.toFixed(2);
}

export interface Column {
  title: string;
  width: number;
  align?: 'left';
}

/** Lines of equal columns, printed as rows become known. */
export function line(columns: readonly Column[], cells: readonly string[]): string {
  return columns
    .map(({ width, align }, i) => (align ? cells[i]!.padEnd(width) : cells[i]!.padStart(width)))
    .join('  ')
    .trimEnd();
}
