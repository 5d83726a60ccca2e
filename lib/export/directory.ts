/** Writing an exported checkpoint: a model directory that appears under its name when it is whole. */
import { randomUUID } from 'node:crypto';
import { existsSync, readdirSync } from 'node:fs';
import { mkdir, rename, rm } from 'node:fs/promises';
import { basename, dirname, join, resolve } from 'node:path';
import {
  checkSpace,
  copyCompanionFiles,
  makeDirectory,
  readBytes,
  writeFileAtomic,
  writeJson,
} from '../checkpoint/files';
import { writeSafetensors, type TensorEntry } from '../checkpoint/safetensors';
import { INDEX, REPORT, type Checkpoint } from '../checkpoint/source';
import { EacMoeError } from '../errors';

export interface DirectoryContent {
  /** The tensors that one of the source becomes; none: it is left out. Data are asked for one after the other. */
  convert(name: string): TensorEntry[];
  config: Record<string, unknown>;
}

/** @throws EacMoeError OUTPUT where something is in the way */
export function checkFree(output: string): void {
  const taken = existsSync(output) && !isEmptyDirectory(output);
  if (taken)
    throw new EacMoeError('OUTPUT', `${output}: already exists; choose another name, or remove it first`);
}

function isEmptyDirectory(path: string): boolean {
  try {
    return readdirSync(path).length === 0;
  } catch {
    return false;
  }
}

/**
 * Writes `content` in the source's shards, with its tokenizer files and report. Everything goes to a hidden directory beside `output`,
 * which is renamed at the end; on failure it is removed. Returns the bytes of the weight files.
 */
export async function writeDirectory(
  output: string,
  source: Checkpoint,
  content: DirectoryContent,
): Promise<number> {
  const to = resolve(output);
  checkFree(to);
  await checkSpace(to, source.byteLength);
  await makeDirectory(dirname(to));
  // Not mkdtemp, whose directories nobody else may read.
  const temporary = join(dirname(to), `.${basename(to)}.tmp-${randomUUID().slice(0, 8)}`);
  await mkdir(temporary);
  try {
    const bytes = await writeWeights(temporary, source, content);
    await copyCompanionFiles(source.dir, temporary);
    if (existsSync(join(source.dir, REPORT))) {
      const report = readBytes(join(source.dir, REPORT));
      await writeFileAtomic(join(temporary, REPORT), [report], report.byteLength);
    }
    await writeJson(join(temporary, 'config.json'), content.config);
    await rename(temporary, to);
    return bytes;
  } catch (error) {
    await rm(temporary, { recursive: true, force: true });
    throw error;
  }
}

async function writeWeights(dir: string, source: Checkpoint, content: DirectoryContent): Promise<number> {
  const files = new Map(source.files().map((file) => [file, [] as string[]]));
  for (const name of source.names()) files.get(source.info(name).file)!.push(name);
  const weightMap: [name: string, file: string][] = [];
  let bytes = 0;
  let total = 0;
  for (const [file, names] of files) {
    const written = await writeSafetensors(
      join(dir, file),
      names.flatMap((name) => content.convert(name)),
    );
    for (const name of written.names) weightMap.push([name, file]);
    bytes += written.bytes;
    total += written.tensorBytes;
  }
  if (files.size > 1) {
    const weight_map = Object.fromEntries(weightMap.sort(([a], [b]) => (a < b ? -1 : 1)));
    await writeJson(join(dir, INDEX), { metadata: { total_size: total }, weight_map });
  }
  return bytes;
}
