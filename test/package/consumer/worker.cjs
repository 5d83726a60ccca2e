// The addon loaded in workers only, two at once and one after another, then in the main thread too.
const { Worker, isMainThread } = require('node:worker_threads');
const use = require('./use.cjs');

const work = () => use(require('eac-moe'), require('eac-moe/kernels'));
const inWorker = () =>
  new Promise((resolve, reject) => {
    const worker = new Worker(__filename);
    worker.once('error', reject);
    worker.once('exit', (code) =>
      code === 0 ? resolve() : reject(new Error(`the worker exited with ${code}`)),
    );
  });

async function main() {
  await Promise.all([inWorker(), inWorker()]);
  await inWorker();
  await work();
}

(isMainThread ? main() : work()).catch((error) => {
  console.error(error);
  process.exit(1);
});
