# CMakeLists.txt builds the same sources with the same flags; change both.
# Environment: EAC_MOE_WERROR=1 turns warnings into errors.
{
  'variables': {
    'werror%': '<!(node -p "process.env.EAC_MOE_WERROR === \'1\' ? 1 : 0")',
    'version': '<!(node -p "require(\'./package.json\').version")',
    # node's common.gypi leaves rtti and exceptions off and sets an older standard.
    'node_flags': ['-fno-exceptions', '-fno-rtti', '-std=gnu++17', '-std=gnu++20', '-fno-strict-aliasing'],
    'flags': [
      '-std=c++20', '-O3', '-fvisibility=hidden', '-fvisibility-inlines-hidden',
      '-fno-math-errno', '-fno-trapping-math', '-Wall', '-Wextra',
    ],
  },
  'target_defaults': {
    'include_dirs': ['native'],
    'cflags!': ['-O2', '-Wno-unused-parameter'],
    'cflags_cc!': ['<@(node_flags)'],
    'cflags_cc': ['<@(flags)'],
    'xcode_settings': {
      'CLANG_CXX_LANGUAGE_STANDARD': 'c++20',
      'CLANG_CXX_LIBRARY': 'libc++',
      'GCC_ENABLE_CPP_EXCEPTIONS': 'YES',
      'GCC_ENABLE_CPP_RTTI': 'YES',
      'GCC_OPTIMIZATION_LEVEL': '3',
      'GCC_SYMBOLS_PRIVATE_EXTERN': 'YES',
      'MACOSX_DEPLOYMENT_TARGET': '12.0',
      'OTHER_CPLUSPLUSFLAGS': ['-fno-math-errno', '-fno-trapping-math', '-Wall', '-Wextra'],
    },
    'conditions': [
      ['werror==1', {
        'cflags_cc': ['-Werror'],
        'xcode_settings': {'GCC_TREAT_WARNINGS_AS_ERRORS': 'YES'},
      }],
    ],
  },
  'targets': [
    {
      'target_name': 'eac_moe',
      'sources': ['<!@(node scripts/sources.js addon core)'],
      'include_dirs': ['<!(node -p "require(\'node-addon-api\').include_dir")'],
      'defines': [
        'NAPI_VERSION=8',
        'NAPI_CPP_EXCEPTIONS',
        # Without it, terminating a worker during a throwing call aborts the process.
        'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS=',
        'EAC_MOE_VERSION="<(version)"',
      ],
      'conditions': [
        ['target_arch=="x64"', {'dependencies': ['eac_moe_avx2', 'eac_moe_avx512']}],
        ['target_arch=="arm64"', {'dependencies': ['eac_moe_dotprod', 'eac_moe_i8mm']}],
        ['OS=="linux"', {
          'libraries': ['-ldl'],
          'ldflags': [
            '-pthread',
            # Our threads outlive the worker that loaded us: never unmap.
            '-Wl,-z,nodelete',
            # A C++ runtime of our own, so that a prebuilt binary needs no newer one; its symbols stay ours.
            '-static-libstdc++', '-static-libgcc', '-Wl,--exclude-libs,ALL',
            '-Wl,--gc-sections',
          ],
          'cflags_cc': ['-pthread', '-ffunction-sections'],
        }],
      ],
    },
  ],
  'conditions': [
    # A file built for an instruction set is a library of its own: gyp has no flags per file.
    ['target_arch=="x64"', {
      'targets': [
        {
          'target_name': 'eac_moe_avx2',
          'type': 'static_library',
          'sources': ['<!@(node scripts/sources.js avx2)'],
          'cflags_cc': ['-mavx2', '-mfma', '-mf16c'],
          'xcode_settings': {'OTHER_CPLUSPLUSFLAGS': ['-mavx2', '-mfma', '-mf16c']},
        },
        {
          'target_name': 'eac_moe_avx512',
          'type': 'static_library',
          'sources': ['<!@(node scripts/sources.js avx512)'],
          'variables': {
            'isa': [
              '-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl', '-mavx512vnni', '-mavx2', '-mfma', '-mf16c',
              '-mprefer-vector-width=512',
            ],
          },
          'cflags_cc': ['<@(isa)'],
          'xcode_settings': {'OTHER_CPLUSPLUSFLAGS': ['<@(isa)']},
        },
      ],
    }],
    ['target_arch=="arm64"', {
      'targets': [
        {
          'target_name': 'eac_moe_dotprod',
          'type': 'static_library',
          'sources': ['<!@(node scripts/sources.js dotprod)'],
          'cflags_cc': ['-march=armv8.2-a+dotprod'],
          'xcode_settings': {'OTHER_CPLUSPLUSFLAGS': ['-march=armv8.2-a+dotprod']},
        },
        {
          'target_name': 'eac_moe_i8mm',
          'type': 'static_library',
          'sources': ['<!@(node scripts/sources.js i8mm)'],
          'cflags_cc': ['-march=armv8.2-a+dotprod+i8mm'],
          'xcode_settings': {'OTHER_CPLUSPLUSFLAGS': ['-march=armv8.2-a+dotprod+i8mm']},
        },
      ],
    }],
  ],
}
