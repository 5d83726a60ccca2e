/** Files that commands read: texts, lists of texts, multiple-choice rows. */
import { readFile } from 'node:fs/promises';
import { EacMoeError, type ChoiceRow } from '../index';

export async function readText(path: string): Promise<string> {
  let bytes: Uint8Array;
  try {
    bytes = await readFile(path);
  } catch (cause) {
    const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
    const why = missing ? 'no such file' : `cannot be read: ${(cause as Error).message}`;
    throw new EacMoeError('FILE_NOT_FOUND', `${path}: ${why}`, { cause });
  }
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw new EacMoeError('INVALID_ARGUMENT', `${path}: is not UTF-8 text`, { cause });
  }
}

/** The texts of a calibration file: a JSON list of texts, or plain text, which is one. */
export async function readTexts(path: string): Promise<string[]> {
  const text = await readText(path);
  const isJson = path.endsWith('.json');
  if (isJson || text.trimStart().startsWith('[')) {
    const list = parse(text);
    if (Array.isArray(list) && list.every((item) => typeof item === 'string')) return list as string[];
    if (isJson) throw new EacMoeError('CALIBRATION', `${path}: expected a JSON list of texts`);
  }
  if (text.trim() === '') throw new EacMoeError('CALIBRATION', `${path}: holds no text`);
  return [text];
}

/** JSON lines, one row each; empty lines are passed over. What is in the rows is the library's to check. */
export async function readChoices(path: string): Promise<ChoiceRow[]> {
  const rows: ChoiceRow[] = [];
  for (const [i, line] of (await readText(path)).split('\n').entries()) {
    if (line.trim() === '') continue;
    const row = parse(line);
    if (row === undefined)
      throw new EacMoeError('INVALID_ARGUMENT', `${path}, line ${i + 1}: is not valid JSON`);
    rows.push(row as ChoiceRow);
  }
  if (rows.length === 0) throw new EacMoeError('INVALID_ARGUMENT', `${path}: holds no rows`);
  return rows;
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text) as unknown;
  } catch {
    return undefined;
  }
}
