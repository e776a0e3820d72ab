(lp0
(lp1
S'A cat sits'
p2
aS'The cat is sitting'
p3
aF4.5
aS'NEUTRAL'
p4
aI17
aa(lp5
S'caf\xc3\xa9 "au lait"'
p6
ag2
aI1
aa.