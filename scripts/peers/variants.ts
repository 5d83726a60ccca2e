/** Holds llama.cpp to an instruction set: ggml loads the best CPU variant that it finds in a folder, so it gets a folder with fewer. */
import { copyFile, mkdir, readdir } from 'node:fs/promises';
import { join, resolve } from 'node:path';

const BASELINE = ['x64'];
const AVX2 = [...BASELINE, 'sse42', 'sandybridge', 'ivybridge', 'piledriver', 'haswell'];
const AVX512 = [...AVX2, 'skylakex', 'cannonlake', 'cascadelake', 'icelake', 'cooperlake', 'zen4'];

/** ggml's variants that need no more than our level of that name: no AVX-VNNI at avx2, no AMX at avx512. */
export const VARIANTS: Readonly<Record<string, readonly string[]>> = {
  baseline: BASELINE,
  avx2: AVX2,
  avx512: AVX512,
};

/** Copies node-llama-cpp's binaries for x64 with the variants of `isa` only. Returns the folder, for `SideOptions.binaries`. */
export async function copyBinaries(isa: string, parent: string): Promise<string> {
  const name = `${process.platform}-${process.arch}`;
  const from = resolve(__dirname, '../../node_modules/@node-llama-cpp', name, 'bins', name);
  const variants = VARIANTS[isa]!;
  const to = join(parent, 'bins', name);
  await mkdir(to, { recursive: true });
  for (const file of await readdir(from)) {
    const variant = /^libggml-cpu-(\w+)\.so$/.exec(file)?.[1];
    if (variant === undefined || variants.includes(variant)) await copyFile(join(from, file), join(to, file));
  }
  return join(parent, 'bins');
}
