/**
 * clang-format over native/ and test/native/.
 *
 *   node scripts/clang-format.mjs [--check]
 *
 * Uses the binary of the npm package `clang-format`, so that everybody formats with one version; where that has none for the
 * platform, says so and passes.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { createRequire } from 'node:module';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const root = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const packageDirectory = path.dirname(createRequire(import.meta.url).resolve('clang-format/package.json'));
const binary = path.join(packageDirectory, 'bin', `${process.platform}_${process.arch}`, 'clang-format');

const files = ['native', 'test/native']
  .filter((directory) => existsSync(path.join(root, directory)))
  .flatMap((directory) =>
    readdirSync(path.join(root, directory), { recursive: true }).map((file) => path.join(directory, file)),
  )
  .filter((file) => /\.(cpp|h|inl|cu|cuh)$/.test(file))
  .sort();

if (!existsSync(binary)) {
  console.warn(
    `clang-format: the npm package has no binary for ${process.platform}-${process.arch}; not checked`,
  );
} else {
  const mode = process.argv.includes('--check') ? ['--dry-run', '--Werror'] : ['-i'];
  const { status } = spawnSync(binary, [...mode, ...files], { cwd: root, stdio: 'inherit' });
  if (status !== 0) console.error('clang-format: run `npm run format`');
  process.exitCode = status ?? 1;
}
