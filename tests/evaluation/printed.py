"""What llama-perplexity prints, captured from runs on the demo model (bf16 as the base, Q4_K against it)."""

BASE_STDOUT = """0.08 minutes
[1]20.6594,[2]17.6658,[3]22.1605,[4]26.9172,[5]28.5210,[6]29.1533,
"""

BASE_STDERR = """0.01.774.657 I perplexity: saving all logits to base.bin
0.01.774.662 I perplexity: tokenizing the input ..
0.01.867.527 I perplexity: tokenization took 92.854 ms
0.01.867.587 I perplexity: calculating perplexity over 6 chunks, n_ctx=512, batch_size=2048, n_seq=4
0.05.390.375 I perplexity: 3.51 seconds per pass - ETA 0.09.166.742 I Final estimate: PPL = 29.1533 +/- 2.07632

"""

KLD_STDERR = """0.01.370.176 I kl_divergence: computing over 6 chunks, n_ctx=512, batch_size=2048, n_seq=4
0.06.320.879 I kl_divergence: 4.95 seconds per pass - ETA
"""

KLD_STDOUT = """0.12 minutes

chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS            Same top p
   1      21.0072 ±    3.5772       0.01669 ±    0.01050       0.01386 ±    0.00103     2.684 ±  0.264 %    93.333 ±  1.565 %
   2      17.8963 ±    2.1035       0.01296 ±    0.00734       0.01454 ±    0.00128     3.082 ±  0.360 %    93.529 ±  1.090 %
   3      22.5756 ±    2.2700       0.01856 ±    0.00606       0.01450 ±    0.00093     2.768 ±  0.273 %    93.595 ±  0.886 %
   4      27.3886 ±    2.4064       0.01737 ±    0.00545       0.01483 ±    0.00082     2.635 ±  0.234 %    92.255 ±  0.837 %
   5      28.9249 ±    2.2573       0.01406 ±    0.00485       0.01548 ±    0.00088     2.646 ±  0.217 %    91.529 ±  0.780 %
   6      29.6257 ±    2.1163       0.01608 ±    0.00453       0.01527 ±    0.00077     2.532 ±  0.191 %    91.699 ±  0.706 %

====== Perplexity statistics ======
Mean PPL(Q)                   :  29.625717 ±   2.116334
Mean PPL(base)                :  29.153271 ±   2.076323
Cor(ln(PPL(Q)), ln(PPL(base))):  99.80%
Mean ln(PPL(Q)/PPL(base))     :   0.016076 ±   0.004529
Mean PPL(Q)/PPL(base)         :   1.016206 ±   0.004602
Mean PPL(Q)-PPL(base)         :   0.472447 ±   0.138841

====== KL divergence statistics ======
Mean    KLD:   0.015272 ±   0.000769
Maximum KLD:   0.686449
99.9%   KLD:   0.348848
99.0%   KLD:   0.135729
95.0%   KLD:   0.040565
90.0%   KLD:   0.027567
Median  KLD:   0.009329
10.0%   KLD:   0.001901
 5.0%   KLD:   0.000117
 1.0%   KLD:   0.000000
 0.1%   KLD:  -0.000003
Minimum KLD:  -0.000003

====== Token probability statistics ======
Mean    Δp: -0.088 ± 0.065 %
Maximum Δp: 26.154%
99.9%   Δp: 14.692%
99.0%   Δp:  6.636%
95.0%   Δp:  2.988%
90.0%   Δp:  1.598%
75.0%   Δp:  0.231%
Median  Δp: -0.001%
25.0%   Δp: -0.280%
10.0%   Δp: -1.618%
 5.0%   Δp: -3.395%
 1.0%   Δp: -8.161%
 0.1%   Δp: -21.454%
Minimum Δp: -30.074%
RMS Δp    :  2.532 ± 0.191 %
Same top p: 91.699 ± 0.706 %
"""

TOO_SHORT_STDERR = """0.01.679.948 I perplexity: saving all logits to b2.bin
0.01.679.953 I perplexity: tokenizing the input ..
"""
