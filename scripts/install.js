/**
 * Builds the addon from source with node-gyp, if it has to.
 *
 *   node scripts/install.js            npm's install script: does nothing in an installed package whose binary loads
 *   node scripts/install.js --build    always builds
 *
 * In a clone it always builds, incrementally, so that the binary follows the sources.
 */
'use strict';
const { spawnSync } = require('node:child_process');
const { existsSync } = require('node:fs');
const path = require('node:path');

const root = path.dirname(__dirname);
const prefix = path.dirname(path.dirname(process.execPath));

/** node-gyp: this project's own, the one npm hands to install scripts, or the one inside the npm beside this node. */
function findNodeGyp() {
  try {
    return require.resolve('node-gyp/bin/node-gyp.js', { paths: [root] });
  } catch {
    const inNpm = 'npm/node_modules/node-gyp/bin/node-gyp.js';
    const candidates = [
      process.env.npm_config_node_gyp,
      process.env.npm_execpath &&
        path.join(path.dirname(process.env.npm_execpath), '../node_modules/node-gyp/bin/node-gyp.js'),
      path.join(prefix, 'lib/node_modules', inNpm),
      path.join(prefix, 'share/nodejs/node-gyp/bin/node-gyp.js'),
      path.join(prefix, 'share', inNpm),
    ];
    return candidates.find((file) => file && existsSync(file));
  }
}

/** Loading may crash on a foreign machine: try it in a process of its own. */
function binaryLoads() {
  const load = `require('node-gyp-build')(${JSON.stringify(root)})`;
  return spawnSync(process.execPath, ['-e', load], { cwd: root, stdio: 'ignore' }).status === 0;
}

function build() {
  const nodeGyp = findNodeGyp();
  if (!nodeGyp) {
    console.error(
      'eac-moe: no node-gyp found. Install it (npm install -g node-gyp) and run this command again.',
    );
    return 1;
  }
  const args = [nodeGyp, 'configure', 'build', '--jobs=max'];
  // Headers that came with node save a download.
  if (existsSync(path.join(prefix, 'include/node/node_api.h'))) args.push(`--nodedir=${prefix}`);
  const { status, error } = spawnSync(process.execPath, args, { cwd: root, stdio: 'inherit' });
  if (status === 0) return 0;
  console.error(
    `eac-moe: the native addon could not be built${error ? ` (${error.message})` : ''}. ` +
      'It needs Python 3, make and a C++20 compiler (g++ 11 or clang 14, or newer); see the messages above.',
  );
  return 1;
}

const isClone = existsSync(path.join(root, 'tsconfig.build.json'));
const wanted = process.argv.includes('--build') || isClone || !binaryLoads();
process.exitCode = wanted ? build() : 0;
