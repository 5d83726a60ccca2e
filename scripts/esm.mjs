/**
 * Writes the ESM half of dist/: per entry a thin .mjs that re-exports the names of the CommonJS module, and its
 * declarations. One implementation, so `instanceof` holds between the two.
 */
import { createRequire } from 'node:module';
import { chmodSync, existsSync, writeFileSync } from 'node:fs';

const require = createRequire(import.meta.url);
const dist = new URL('../dist/', import.meta.url);

for (const entry of ['index', 'kernels']) {
  if (!existsSync(new URL(`${entry}.js`, dist))) {
    console.error(`scripts/esm.mjs: dist/${entry}.js is missing; is lib/${entry}.ts?`);
    process.exitCode = 1;
    continue;
  }
  const names = Object.keys(require(`../dist/${entry}.js`)).filter((name) => name !== 'default');
  const lines = names.map((name) => `export const ${name} = cjs.${name};`);
  writeFileSync(new URL(`${entry}.mjs`, dist), `import cjs from './${entry}.js';\n${lines.join('\n')}\n`);
  writeFileSync(new URL(`${entry}.d.mts`, dist), `export * from './${entry}.js';\n`);
}

const cli = new URL('cli/index.js', dist);
if (existsSync(cli)) chmodSync(cli, 0o755);
