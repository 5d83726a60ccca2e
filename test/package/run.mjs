/**
 * The packed tarball, as a user gets it. Two empty projects:
 *   bundled   a tarball with a prebuilt binary: installs without compiling; ESM, CommonJS, worker thread and TypeScript consumers
 *   source    a tarball without one and install scripts switched off (as npm 12 and pnpm do): everything but the addon works, the
 *             error names the command that builds it, and that command does
 * Needs a built clone (npm ci) and the npm registry.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';

const here = path.dirname(fileURLToPath(import.meta.url));
const root = path.dirname(path.dirname(here));
const work = mkdtempSync(path.join(os.tmpdir(), 'eac-moe-package-'));

// A user's environment: nothing of the npm that may be running us.
const env = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !/^(npm_|NODE_PATH|INIT_CWD|EAC_MOE_)/i.test(name)),
);

function run(cwd, command, ...args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    cwd,
    env,
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  });
  if (error) throw error;
  return { status, text: stdout + stderr, stdout };
}
function must(cwd, command, ...args) {
  const result = run(cwd, command, ...args);
  assert.equal(result.status, 0, `${command} ${args.join(' ')} failed:\n${result.text}`);
  return result.stdout;
}
const tool = (name) => path.join(root, 'node_modules', '.bin', name);

let passed = 0;
function step(name, body) {
  const result = body();
  passed++;
  console.log(`ok ${name}`);
  return result;
}

function pack(directory, into) {
  const destination = path.join(work, into);
  mkdirSync(destination);
  must(directory, 'npm', 'pack', '--silent', '--ignore-scripts', '--pack-destination', destination);
  return path.join(destination, readdirSync(destination)[0]);
}

function contents(tarball) {
  const files = must(work, 'tar', '-tzf', tarball).trim().split('\n');
  const has = (pattern) => files.some((file) => pattern.test(file));
  for (const file of [
    'dist/index.js',
    'dist/index.mjs',
    'dist/index.d.ts',
    'dist/index.d.mts',
    'dist/kernels.mjs',
  ]) {
    assert(files.includes(`package/${file}`), `${file} is not in the tarball`);
  }
  for (const file of [
    'types/native.d.ts',
    'native/addon/addon.cpp',
    'binding.gyp',
    'CMakeLists.txt',
    'LICENSE',
  ]) {
    assert(files.includes(`package/${file}`), `${file} is not in the tarball`);
  }
  assert(has(/^package\/scripts\/(install|sources)\.js$/));
  const cuda = readdirSync(path.join(root, 'native/kernels/cuda'), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => path.relative(root, path.join(entry.parentPath ?? entry.path, entry.name)));
  assert(cuda.length > 20);
  for (const file of ['scripts/cuda/build', 'scripts/cuda/CMakeLists.txt', ...cuda]) {
    assert(
      files.includes(`package/${file}`),
      `npm run build:cuda needs ${file}, which is not in the tarball`,
    );
  }
  assert(
    !has(/^package\/(lib|test|models|build[\w-]*|docs\/api|node_modules|\.ci)\//),
    'the tarball holds what it should not',
  );
  assert(statSync(tarball).size < 20e6, 'the tarball is larger than 20 MB');
}

/** The tarball with the clone's binary where prebuildify puts it. */
function withBinary(tarball) {
  must(work, 'tar', '-xzf', tarball);
  const binary = path.join(root, 'build', 'Release', 'eac_moe.node');
  assert(existsSync(binary), 'build/Release/eac_moe.node is missing: run `npm run build`');
  const folder = path.join(work, 'package', 'prebuilds', `${process.platform}-${process.arch}`);
  rmSync(path.join(work, 'package', 'prebuilds'), { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  const libc = process.platform !== 'linux' ? '' : existsSync('/etc/alpine-release') ? '.musl' : '.glibc';
  cpSync(binary, path.join(folder, `eac-moe${libc}.node`));
  must(root, process.execPath, 'scripts/check-binary.mjs', path.join(folder, `eac-moe${libc}.node`));
  return pack(path.join(work, 'package'), 'bundled-tarball');
}

function project(name, tarball, ...flags) {
  const directory = path.join(work, name);
  mkdirSync(directory);
  writeFileSync(path.join(directory, 'package.json'), JSON.stringify({ name, private: true }));
  must(directory, 'npm', 'install', '--no-audit', '--no-fund', '--prefer-offline', ...flags, tarball);
  cpSync(path.join(here, 'consumer'), directory, { recursive: true });
  return directory;
}

/** Where nvcc and CMake are, the build is set up, and make told to find all it needs; the clone's own build compiles. */
function cudaBuild(directory) {
  const find = (command) => run(work, 'sh', '-c', command).stdout.trim();
  const nvcc = find('command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null'); // as scripts/cuda/build
  const cmake = find('command -v cmake');
  if (!nvcc || !cmake) {
    const said = run(path.join(directory, 'node_modules', 'eac-moe'), 'npm', 'run', 'build:cuda');
    assert.match(said.text, /no nvcc found|no cmake found/);
    return;
  }
  const out = path.join(work, 'cuda');
  const source = path.join(directory, 'node_modules', 'eac-moe', 'scripts', 'cuda');
  must(
    work,
    cmake,
    '-S',
    source,
    '-B',
    out,
    `-DCMAKE_CUDA_COMPILER=${nvcc}`,
    '-DCMAKE_CUDA_ARCHITECTURES=90',
  );
  assert.match(must(work, cmake, '--build', out, '--target', 'eac_moe_cuda', '--', '-n'), /eac_moe_cuda\.so/);
}

function typescript(directory) {
  const typeRoots = path.join(root, 'node_modules', '@types');
  for (const module of ['node16', 'nodenext']) {
    const flags = [
      '--noEmit',
      '--strict',
      '--target',
      'es2022',
      '--lib',
      'es2023,esnext.disposable',
      '--module',
      module,
    ];
    must(
      directory,
      tool('tsc'),
      ...flags,
      '--types',
      'node',
      '--typeRoots',
      typeRoots,
      'types.mts',
      'types.cts',
    );
  }
}

function withoutBinary(tarball) {
  const directory = project('source', tarball, '--ignore-scripts');
  const installed = path.join(directory, 'node_modules', 'eac-moe');
  assert(!existsSync(path.join(installed, 'build')), 'compiled although scripts were off');
  const failed = run(directory, process.execPath, 'cjs.cjs');
  assert.notEqual(failed.status, 0);
  assert.match(failed.text, /NATIVE_UNAVAILABLE/);
  const command = /node ("[^"]*install\.js" --build)/.exec(failed.text.replaceAll('\\"', '"'));
  assert(command, `the error names no command:\n${failed.text}`);
  must(directory, 'sh', '-c', `"${process.execPath}" ${command[1]}`);
  must(directory, process.execPath, 'cjs.cjs');
}

try {
  must(root, 'npm', 'run', '--silent', 'build:ts');
  const tarball = step('pack', () => pack(root, 'tarball'));
  step('contents', () => contents(tarball));
  step('publint', () => must(root, tool('publint'), 'run', '--strict', tarball));
  step('are the types wrong?', () => must(root, tool('attw'), '--profile', 'node16', tarball));
  const bundled = step('bundle a binary', () => withBinary(tarball));
  const directory = step('install with a binary', () => project('bundled', bundled));
  assert(
    !existsSync(path.join(directory, 'node_modules', 'eac-moe', 'build')),
    'compiled although a binary was bundled',
  );
  for (const consumer of ['esm.mjs', 'cjs.cjs', 'worker.cjs']) {
    step(`consumer ${consumer}`, () => must(directory, process.execPath, consumer));
  }
  step('command line', () =>
    must(directory, path.join(directory, 'node_modules', '.bin', 'eac-moe'), '--help'),
  );
  step('TypeScript consumers', () => typescript(directory));
  step('CUDA library', () => cudaBuild(directory));
  step('install without a binary, then build by the command the error names', () => withoutBinary(tarball));
  console.log(`package: ${passed} passed, 0 failed`);
} catch (error) {
  console.error(error.message ?? error);
  console.log(`package: ${passed} passed, 1 failed`);
  process.exitCode = 1;
} finally {
  rmSync(work, { recursive: true, force: true });
}
