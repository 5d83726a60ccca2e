/**
 * Checks binaries before they are published.
 *
 *   node scripts/check-binary.mjs [--max-glibc 2.31] [file.node...]      default: every prebuilds/<platform>/*.node
 *
 * Of each: the machine that its ELF header names is the one of its folder; it needs no library beyond the C library's own; the
 * highest glibc version it asks for; it exports the Node-API entry; and, where it is for this machine, it loads in a fresh process.
 */
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = path.dirname(path.dirname(fileURLToPath(import.meta.url)));
const { values, positionals } = parseArgs({
  options: { 'max-glibc': { type: 'string' } },
  allowPositionals: true,
});

const machines = { x64: 'X86-64', arm64: 'AArch64' };
const allowed =
  /^(libc|libm|libdl|libpthread|librt|ld-linux-[\w-]+)\.so\.\d+$|^libc\.musl-\w+\.so\.1$|^ld-musl-\w+\.so\.1$/;

function run(command, args) {
  const { status, stdout, stderr, error } = spawnSync(command, args, {
    encoding: 'utf8',
    maxBuffer: 1 << 28,
  });
  if (error) throw error;
  return { ok: status === 0, text: `${stdout}${stderr}` };
}

/** ['linux', 'x64'] from prebuilds/linux-x64/…; this machine for a file elsewhere. */
function targetOf(file) {
  const match = /^(linux|darwin)-(\w+)$/.exec(path.basename(path.dirname(file)));
  return match ? [match[1], match[2]] : [process.platform, process.arch];
}

const number = (version) => version.split('.').reduce((sum, part, i) => sum + Number(part) / 1000 ** i, 0);

function checkElf(file, arch, problems) {
  const machine = /Machine:\s+(.*)/.exec(run('readelf', ['-h', file]).text)?.[1] ?? 'unknown';
  if (!machine.includes(machines[arch] ?? arch)) problems.push(`is for ${machine}, its folder says ${arch}`);

  const needed = [...run('readelf', ['-d', file]).text.matchAll(/\(NEEDED\).*\[(.*)\]/g)].map(
    (match) => match[1],
  );
  const foreign = needed.filter((library) => !allowed.test(library));
  if (foreign.length) problems.push(`needs ${foreign.join(', ')}`);

  const symbols = run('readelf', ['--wide', '--dyn-syms', file]).text;
  const versions = [...symbols.matchAll(/@GLIBC_([\d.]+)/g)].map((match) => match[1]);
  const glibc = versions.sort((a, b) => number(a) - number(b)).at(-1) ?? 'none';
  const limit = values['max-glibc'];
  if (limit && number(glibc) > number(limit)) problems.push(`needs glibc ${glibc}, the limit is ${limit}`);
  if (!/\d+ napi_register_module_v1$/m.test(symbols))
    problems.push('does not export napi_register_module_v1');
  return `${machine}, glibc ${glibc}, needs ${needed.join(' ')}`;
}

function check(file) {
  const [platform, arch] = targetOf(file);
  const problems = [];
  const facts = platform === 'linux' ? checkElf(file, arch, problems) : platform;
  if (platform === process.platform && arch === process.arch) {
    const load = `console.log(typeof require(${JSON.stringify(path.resolve(file))}).info().version)`;
    const loaded = run(process.execPath, ['-e', load]);
    if (!loaded.ok || loaded.text.trim() !== 'string') problems.push(`does not load: ${loaded.text.trim()}`);
  }
  console.log(`${problems.length ? 'BAD' : 'ok '} ${path.relative(root, path.resolve(file))}: ${facts}`);
  for (const problem of problems) console.log(`    ${problem}`);
  return problems.length === 0;
}

const prebuilds = path.join(root, 'prebuilds');
const found = existsSync(prebuilds) ? readdirSync(prebuilds, { recursive: true }) : [];
const files = positionals.length
  ? positionals
  : found.filter((file) => file.endsWith('.node')).map((file) => path.join(prebuilds, file));
if (!files.length) console.error('check-binary: nothing to check; run `npm run build:prebuilds` first');
process.exitCode = files.length && files.map(check).every(Boolean) ? 0 : 1;
