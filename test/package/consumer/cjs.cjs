const use = require('./use.cjs');

use(require('eac-moe'), require('eac-moe/kernels')).catch((error) => {
  console.error(error);
  process.exitCode = 1;
});
